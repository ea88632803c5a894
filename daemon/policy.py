# SPDX-License-Identifier: Apache-2.0
"""Tenants: who may attach, what they may do, and how much they may hold. Sans-IO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from transferd.daemon.errors import AccessDenied, QuotaExceeded

if TYPE_CHECKING:
    from transferd.daemon.config import TenantConfig

_WHAT = {
    "sessions": "sessions",
    "regions": "regions",
    "registered_bytes": "bytes of registered memory",
    "grants": "grants",
    "opens": "opened grants",
}


@dataclass(slots=True)
class Tenant:
    """A tenant with what its sessions hold at the moment.

    Attributes:
        config: Its policy.
        used: Amount per limit; the keys of ``_WHAT``.
    """

    config: TenantConfig
    used: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_WHAT, 0))

    @property
    def name(self) -> str:
        """Its name."""
        return self.config.name

    def charge(self, what: str, amount: int = 1) -> None:
        """Takes an amount of a limit.

        Args:
            what: A key of the quotas.
            amount: How much.

        Raises:
            QuotaExceeded: The limit would be passed; nothing is taken.
        """
        limit: int = getattr(self.config.quotas, what)
        if self.used[what] + amount > limit:
            raise QuotaExceeded(
                f"tenant {self.name} holds {self.used[what]} of {limit} {_WHAT[what]}, and "
                f"{amount} more "
                f"are asked for; release some, or raise tenants.quotas.{what}",
                reason=what.upper(),
                limit=limit,
                used=self.used[what],
            )
        self.used[what] += amount

    def refund(self, what: str, amount: int = 1) -> None:
        """Gives an amount back."""
        self.used[what] -= amount

    def check_uid(self, uid: int) -> None:
        """Refuses users that the tenant does not list.

        Raises:
            AccessDenied: With what to add where.
        """
        if self.config.uids and uid not in self.config.uids:
            raise AccessDenied(
                f"user id {uid} may not use tenant {self.name}; add it to the tenant's uids",
                reason="UID_NOT_ALLOWED",
                uid=uid,
            )

    def check_lease(self) -> None:
        """Refuses sessions without the fd socket where policy does not allow them."""
        if not self.config.lease_sessions:
            raise AccessDenied(
                f"tenant {self.name} does not allow sessions without the fd socket; attach by "
                "the SDK, "
                "or set the tenant's lease_sessions: true",
                reason="LEASE_NOT_ALLOWED",
            )

    def check_shm(self, owner_uid: int | None = None) -> None:
        """Refuses shared memory by name where policy does not allow it, or not of that owner."""
        if not self.config.shm_paths:
            raise AccessDenied(
                f"tenant {self.name} may not name shared memory; hand the fd over by the fd "
                "socket, or set "
                "the tenant's shm_paths: true",
                reason="SHM_PATH_NOT_ALLOWED",
            )
        if owner_uid is not None and owner_uid not in self.config.uids:
            raise AccessDenied(
                f"the shared memory belongs to user id {owner_uid}, which is not one of tenant "
                f"{self.name}'s uids",
                reason="SHM_PATH_NOT_ALLOWED",
                uid=owner_uid,
            )
