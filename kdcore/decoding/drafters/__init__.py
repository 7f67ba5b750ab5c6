"""What drafters with weights share: module, cache, folder, and the folders of other engines."""
