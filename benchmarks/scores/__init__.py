"""Every registered score beside the measured loss of each single change, on trained models."""
