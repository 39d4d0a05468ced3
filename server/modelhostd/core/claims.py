"""Claims: what loads that wait for memory leave to those behind them."""

from dataclasses import field, replace

from modelhostd.core.residency import DeviceView
from modelhostd.core.resources import InstanceState
from modelhostd.core.values import dataclass


@dataclass(slots=True)
class Claims:
    """What loads that wait have been promised: bytes by device (and of host memory), and who goes for them."""

    bytes: dict[str, int] = field(default_factory=dict)
    behind: set[str] = field(default_factory=set)

    def over(self, view: DeviceView) -> DeviceView:
        """Return a device as the next load sees it: who goes for another counts as on its way out."""
        holdings = [
            replace(h, state=InstanceState.DRAINING) if h.model in self.behind else h
            for h in view.holdings
        ]
        return replace(view, holdings=holdings, claimed_bytes=self.bytes.get(view.id, 0))
