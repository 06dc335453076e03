"""latentgen: train, fine-tune and sample text-to-image latent diffusion models."""

__version__ = "0.1.0"
