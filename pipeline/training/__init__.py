"""Training of PuLID for FLUX as its paper describes it (arXiv 2404.16022): IDFormer and cross-attentions, FLUX frozen.

Read in this order: config, losses, attention, sampling, draws, examples, networks, objective, optimiser, trainer.
"""
