"""Networks in files: architectures, preprocessing, images, loading and saving, and conversions that are checked."""
