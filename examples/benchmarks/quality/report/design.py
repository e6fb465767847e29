"""How each suite measures, as the report says it above its tables."""

from __future__ import annotations

DESIGN = {
    "text": """\
A small masked-diffusion language model learns a domain of one-line questions that a maintained generator makes and
judges. The validation loss is the cross-entropy of a masked token in nats, on questions that aren't trained on (their
words may be: most scrambled words stand in other questions too), under masks that are the same for every run, each
(but for empty ones) beside its complement; it is taken in ten bins of λ and averaged over them. The wholly masked
answer, from which generation starts, is in it as often as in training. Exact match is the share of test questions whose
generated answer the generator's own verifier accepts. Learning rates were chosen by the loss on further questions, with
a seed of its own.""",
    "images": """\
A small Stable Diffusion XL learns a subject from five pictures, and is then judged on what it has not seen. The
validation loss is the squared error of the predicted noise on 440 further pictures of the subject, half of them in
other poses before other walls and half in the ten places of the backbone's data, which the training never shows, with
noise that is the same for every run; it is taken in ten bins of λ, each with pictures of its own, and averaged over
them. Samples are drawn for the bare prompt and for seven places, from noise that follows from the seed. Similarity to
the subject is the mean cosine to the five training pictures by a small CLIP, text alignment that to the prompt without
the subject's name, and the similarity to the subject drawn in that place asks for both at once. Learning rates were
chosen by the loss on a further subject, with a seed of its own.""",
}
