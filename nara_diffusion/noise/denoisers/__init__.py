"""What each class of Diffusers' denoisers tells of the noise, and the classes that tell none."""
