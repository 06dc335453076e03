"""What the original programs call the parts of a model, and diffusers: tables that files of all kinds are read by."""
