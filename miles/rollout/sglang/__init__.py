"""Real SGLang servers as engines: started or attached to, spoken to over HTTP, nothing of SGLang imported."""
