"""From a sample's texts to token ids: what a prompt is, whatever benchmark it comes from."""
