"""The report of an artifact: charts, and one HTML page that holds them."""
