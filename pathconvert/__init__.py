"""Move pretrained ReLU networks into path space and back."""
