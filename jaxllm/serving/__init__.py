"""The OpenAI API over one `LLM`: what clients, harnesses and load balancers speak. Needs `pip install "jaxllm[serve]"`."""
