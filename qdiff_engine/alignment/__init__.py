"""Multi-step alignment: step sizes learnt so that groups of quantised steps end where the float ones do."""
