"""Models that live in files, one runtime a module, each as uint8 images -> probabilities."""
