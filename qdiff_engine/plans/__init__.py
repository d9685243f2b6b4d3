"""Plans: the activation precision of every row, by the SNR rule or by the measured error of the final image."""
