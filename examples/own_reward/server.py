"""A reward server: `python examples/own_reward/server.py`, and `verifier.url: http://127.0.0.1:8700/rewards`."""

from __future__ import annotations

from aiohttp import web


async def rewards(request: web.Request) -> web.Response:
    """Rewards each response that ends with the reference answer."""
    asked = (await request.json())["requests"]
    return web.json_response(
        {"rewards": [float(one["response"].rstrip(" .}").endswith(one["prompt"]["answer"])) for one in asked]}
    )


def application() -> web.Application:
    app = web.Application(client_max_size=64 * 2**20)
    app.router.add_post("/rewards", rewards)
    return app


if __name__ == "__main__":
    web.run_app(application(), host="127.0.0.1", port=8700)
