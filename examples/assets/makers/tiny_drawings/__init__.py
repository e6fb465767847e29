"""What the pictures show: scenes of objects in places, and the subjects of DreamBooth."""
