"""A run as one page that opens from a disk: tables to sort, figures, volumes to look into, nothing fetched."""
