"""The command line `nara`: what an adapter's file holds, drawn, compared, checked and evaluated."""
