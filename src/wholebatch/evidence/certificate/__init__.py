"""What is wrong with a window, whoever wrote its loop? It is run on three cuts, judged, and the mistake named."""
