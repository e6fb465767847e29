"""The folder of a run: who may write to it, what it holds for people, and how it gets to the Hub."""
