"""Labels stay at the sites: heads and scores from what each site adds up."""
