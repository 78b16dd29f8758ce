"""All that is invented: restricted topics, the demo's world, prompts written for this project, and who judges them."""
