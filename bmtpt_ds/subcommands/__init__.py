"""The commands of `bmtpt`: what each takes, and the one function that it calls; no logic."""
