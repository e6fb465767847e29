"""The regimes of text: a language model that is blind to λ, and one that sees it by counting masks."""
