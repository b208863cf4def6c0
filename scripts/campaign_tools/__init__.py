"""What `campaign.py` is made of."""
