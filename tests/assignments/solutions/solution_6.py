"""The residual stream as a hook site.

In pythia.py three lines do it: `self.site = "mlp"` in Pythia.__init__, and in _run, behind the call of the block,

    if self.site == "resid":
        mlp_BTD = x_BTD

From outside the same is done block by block, which needs no copy of _run.
"""

from pythia import Block, Pythia


def install(monkeypatch, read=lambda x_BTD, stream_BTD, mlp_BTD: stream_BTD, default="mlp") -> None:
    original = Block.forward

    def forward(self, x_BTD, *rest):
        stream_BTD, mlp_BTD, neurons_BTM = original(self, x_BTD, *rest)
        resid = getattr(self, "site", default) == "resid"
        return stream_BTD, read(x_BTD, stream_BTD, mlp_BTD) if resid else mlp_BTD, neurons_BTM

    def set_site(self, site: str) -> None:
        for block in self.gpt_neox.layers:
            block.site = site

    monkeypatch.setattr(Block, "forward", forward)
    monkeypatch.setattr(Pythia, "site", property(lambda self: getattr(self.gpt_neox.layers[0], "site", default), set_site), raising=False)


def shared(monkeypatch) -> None:
    """One setting for all models."""
    install(monkeypatch)
    monkeypatch.setattr(Block, "site", "mlp", raising=False)
    monkeypatch.setattr(Pythia, "site", property(lambda self: Block.site, lambda self, site: setattr(Block, "site", site)))


WRONG = {
    "the stream before the block": lambda patch: install(patch, lambda x_BTD, stream_BTD, mlp_BTD: x_BTD),
    "the stream between attention and MLP": lambda patch: install(patch, lambda x_BTD, stream_BTD, mlp_BTD: stream_BTD - mlp_BTD),
    "what the block adds": lambda patch: install(patch, lambda x_BTD, stream_BTD, mlp_BTD: stream_BTD - x_BTD),
    "nothing but the attribute": lambda patch: install(patch, lambda x_BTD, stream_BTD, mlp_BTD: mlp_BTD),
    "the new site is the default": lambda patch: install(patch, default="resid"),
    "a setting that all models share": shared,
}
