"""Request to tokens: scheduler, pools, runner, sampler. Never imports fastapi."""
