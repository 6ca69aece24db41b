"""What a runner core needs of SGLang, in its import structure: runners, hooks, a Triton runner of plain torch."""
