"""What ``job:`` names, one file each: from a validated spec to a run folder."""
