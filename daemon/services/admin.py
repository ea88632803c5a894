# SPDX-License-Identifier: Apache-2.0
"""transferd.v1.AdminService: looking into the daemon."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import transferd
from transferd.daemon.errors import InvalidRequest
from transferd.daemon.peer import STAGED_PROTOCOL, PathCount, count_paths
from transferd.daemon.plane import Op, PlaneError, Priority, SessionStat
from transferd.daemon.topology.model import UNKNOWN_NODE
from transferd.v1 import admin_pb2 as pb
from transferd.v1 import admin_pb2_grpc, types_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

    import grpc.aio

    from transferd.daemon.config import VerbsConfig
    from transferd.daemon.descriptor import PeerKey
    from transferd.daemon.opens import Opener
    from transferd.daemon.owner import Owner
    from transferd.daemon.peers import Peers
    from transferd.daemon.plane import JobInfo, Plane, RailInfo
    from transferd.daemon.region import Region
    from transferd.daemon.session import Session
    from transferd.daemon.sessions import Sessions
    from transferd.daemon.staging import Gpu, Staging
    from transferd.daemon.topology import Choice, Verdict

    Context = grpc.aio.ServicerContext[Any, Any]

PAGE_DEFAULT = 1000
PAGE_MAX = 10_000
LOCAL = "local"  # the rail of copies within the daemon
NOTHING = SessionStat(0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Facts:
    """What does not change while the daemon runs.

    Attributes:
        started_ns: On the monotonic clock.
        warnings: What operators should know; one sentence each.
        rails: Which NICs became rails, and why.
        verbs: How provider verbs uses them; None with others.
    """

    own: PeerKey
    started_ns: int
    peer_address: str
    tls: bool
    provider: str
    warnings: tuple[str, ...]
    rails: Choice
    verbs: VerbsConfig | None = None


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """Reads tables; changes nothing."""

    def __init__(
        self,
        facts: Facts,
        plane: Plane,
        sessions: Sessions,
        owner: Owner,
        opener: Opener,
        peers: Peers,
        staging: Staging,
    ) -> None:
        self._facts = facts
        self._plane = plane
        self._sessions = sessions
        self._owner = owner
        self._opener = opener
        self._peers = peers
        self._staging = staging

    async def GetStatus(
        self, request: pb.GetStatusRequest, context: Context
    ) -> pb.GetStatusResponse:
        """The daemon as a whole."""
        facts = self._facts
        regions = [
            region for session in self._sessions.table for region in session.regions.values()
        ]
        return pb.GetStatusResponse(
            version=transferd.__version__,
            daemon_id=facts.own.daemon_id,
            boot_epoch=facts.own.boot_epoch,
            uptime_ms=(time.monotonic_ns() - facts.started_ns) // 1_000_000,
            state="DRAINING" if self._sessions.stopping else "SERVING",
            provider=facts.provider,
            warnings=facts.warnings,
            peer_address=facts.peer_address,
            tls=facts.tls,
            sessions=len(self._sessions.table),
            regions=len(regions),
            peers=len(self._peers.table),
            registered_bytes=sum(region.length for region in regions),
            pid=os.getpid(),
        )

    async def ListSessions(
        self, request: pb.ListSessionsRequest, context: Context
    ) -> pb.ListSessionsResponse:
        """Sessions, living and ending."""
        rows = {session.session_id: session for session in self._sessions.table}
        page, token = _page(request, sorted(rows))
        now_ns = time.monotonic_ns()
        return pb.ListSessionsResponse(
            sessions=[self._session(rows[number], now_ns) for number in page], next_page_token=token
        )

    def _session(self, session: Session, now_ns: int) -> pb.SessionInfo:
        try:
            stat = self._plane.session_stat(session.handle) if session.handle else NOTHING
        except PlaneError:  # freed a moment ago
            stat = NOTHING
        return pb.SessionInfo(
            session_id=session.session_id,
            name=session.origin.name,
            tenant=session.tenant.name,
            pid=session.origin.pid,
            uid=session.origin.uid,
            state=session.state,
            regions=len(session.regions),
            grants=len(session.grants),
            opens=len(session.live_opens),
            jobs_in_flight=stat.jobs_in_flight,
            jobs_ended=stat.jobs_ended,
            jobs_failed=stat.jobs_failed,
            bytes_sent=stat.bytes_sent,
            imms_received=stat.imms_received,
            age_ms=(now_ns - session.created_ns) // 1_000_000,
            weight=session.tenant.config.weight,
        )

    async def ListRegions(
        self, request: pb.ListRegionsRequest, context: Context
    ) -> pb.ListRegionsResponse:
        """Regions of all sessions."""
        rows = {r.number: r for session in self._sessions.table for r in session.regions.values()}
        page, token = _page(request, sorted(rows))
        return pb.ListRegionsResponse(
            regions=[self._region(rows[number]) for number in page], next_page_token=token
        )

    def _region(self, region: Region) -> pb.RegionInfo:
        openers = {peer for grant in region.grants.values() for peer in grant.openers}
        zombie = not region.session.is_open and region.state == "ACTIVE"
        return pb.RegionInfo(
            session_id=region.session.session_id,
            region=region.handle,
            name=region.name,
            kind=region.memory.kind,
            length_bytes=region.length,
            grants=len(region.grants),
            openers=len(openers),
            state="ZOMBIE" if zombie else region.state,
            mappings=self._owner.maps.count(region),
        )

    async def ListPeers(
        self, request: pb.ListPeersRequest, context: Context
    ) -> pb.ListPeersResponse:
        """Daemons that this one holds something of, or that hold something of it."""
        losses = self._peers.table.losses
        peers = [
            pb.PeerInfo(
                address=peer.address,
                daemon_id=peer.key.daemon_id,
                boot_epoch=peer.key.boot_epoch,
                state=peer.state,
                connections=sum(len(lane.paths_up()) for lane in peer.lanes.values())
                + len(peer.incoming),
                opened_there=len(peer.remote),
                opened_here=len(peer.opened_here),
                losses=losses.get(peer.address, 0),
                paths_down=sum(count.down for count in count_paths([peer]).values()),
            )
            for peer in self._peers.all()
        ]
        known = {peer.address for peer in peers}
        peers += [
            pb.PeerInfo(address=address, state="LOST", losses=count)
            for address, count in losses.items()
            if address not in known
        ]
        return pb.ListPeersResponse(peers=peers)

    async def ListRails(
        self, request: pb.ListRailsRequest, context: Context
    ) -> pb.ListRailsResponse:
        """NIC endpoints, the NICs that are not used, and why."""
        choice, verbs = self._facts.rails, self._facts.verbs
        verdicts = {verdict.nic.name: verdict for verdict in choice.rails}
        paths = count_paths(self._peers.all())
        return pb.ListRailsResponse(
            rails=[
                _rail(i, rail, verdicts.get(rail.name), paths.get(i, PathCount()), verbs)
                for i, rail in enumerate(self._plane.rail_stats())
            ],
            unused=[
                pb.UnusedNic(
                    name=verdict.nic.name,
                    state=verdict.nic.state,
                    numa_node=verdict.nic.numa_node,
                    pci_address=verdict.nic.pci_address,
                    speed_mbit_per_s=verdict.nic.speed_mbit,
                    why=verdict.why,
                )
                for verdict in choice.unused
            ],
            near=[
                pb.NearRails(
                    gpu=group.gpu,
                    numa_node=group.numa_node,
                    distance=group.distance.name if group.distance is not None else "",
                    rails=group.nics,
                    why=group.why,
                )
                for group in choice.groups
            ],
            why=choice.why,
            fallback=choice.fallback,
        )

    async def ListGpus(self, request: pb.ListGpusRequest, context: Context) -> pb.ListGpusResponse:
        """GPUs whose memory is staged."""
        return pb.ListGpusResponse(gpus=[self._gpu(gpu) for gpu in self._staging])

    def _gpu(self, gpu: Gpu) -> pb.GpuInfo:
        helper = gpu.helper
        stat = self._staging.stat(gpu)
        return pb.GpuInfo(
            uuid=gpu.name,
            name=helper.gpu_name if helper is not None else "",
            state=gpu.state,
            pid=helper.pid if helper is not None else 0,
            restarts=max(0, gpu.starts - 1),
            memories=len(helper.memories) if helper is not None else 0,
            copies_to_host=stat.copies_out,
            bytes_to_host=stat.bytes_out,
            copies_to_gpu=stat.copies_in,
            bytes_to_gpu=stat.bytes_in,
            failed=stat.failed,
            reason=gpu.reason,
        )

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:
        """Jobs in flight, oldest first."""
        limit = min(request.max_jobs or PAGE_DEFAULT, PAGE_MAX)
        sessions = {
            session.handle: session
            for session in self._sessions.table
            if session.handle and request.session_id in (0, session.session_id)
        }
        jobs: list[JobInfo] = []
        for handle in sessions:
            with contextlib.suppress(PlaneError):  # freed a moment ago
                jobs += self._plane.jobs(handle, limit + 1)
        jobs.sort(key=lambda job: -job.age_ns)
        truncated = len(jobs) > limit
        del jobs[limit:]
        return pb.ListJobsResponse(
            jobs=[self._job(job, sessions.get(job.session)) for job in jobs], truncated=truncated
        )

    def _job(self, job: JobInfo, session: Session | None) -> pb.JobInfo:
        opened = session.opens.get(job.open) if session is not None else None
        latency = job.priority == Priority.LATENCY
        return pb.JobInfo(
            session_id=session.session_id if session is not None else 0,
            job_id=job.job_id,
            operation=Op(job.op).name if job.op in Op.__members__.values() else str(job.op),
            length_bytes=job.length,
            acknowledged_bytes=job.acknowledged,
            imm=job.imm,
            priority=types_pb2.PRIORITY_LATENCY if latency else types_pb2.PRIORITY_BULK,
            status=job.status or types_pb2.JOB_STATUS_PENDING,  # type: ignore[arg-type]
            age_ms=job.age_ns // 1_000_000,
            peer=opened.grant.peer.address if opened is not None else "",
        )


def _rail(
    number: int,
    rail: RailInfo,
    verdict: Verdict | None,
    paths: PathCount,
    verbs: VerbsConfig | None,
) -> pb.RailInfo:
    nic = verdict.nic if verdict is not None else None
    levels = verbs if verbs is not None and rail.name != LOCAL else None
    if rail.protocol.startswith(STAGED_PROTOCOL):
        why = "through pinned host memory, for GPU memory that nothing else reaches"
    elif rail.name == LOCAL:
        why = "memory copies within this daemon; no NIC"
    else:
        why = verdict.why if verdict is not None else "opened by the provider"
    return pb.RailInfo(
        group=0,
        rail=number,
        name=rail.name,
        provider=rail.provider,
        protocol=rail.protocol,
        state=rail.state.name,
        bytes_sent=rail.bytes_sent,
        writes_sent=rail.writes_sent,
        imms_received=rail.imms_received,
        errors=rail.errors,
        why=why,
        numa_node=nic.numa_node if nic is not None else UNKNOWN_NODE,
        pci_address=nic.pci_address if nic is not None else "",
        speed_mbit_per_s=nic.speed_mbit if nic is not None else 0,
        paths_up=paths.up,
        paths_down=paths.down,
        credit_stalls=rail.credit_stalls,
        provider_why=rail.why,
        service_level=levels.service_level if levels is not None else 0,
        bulk_service_level=levels.bulk_service_level if levels is not None else 0,
        traffic_class=levels.traffic_class if levels is not None else 0,
    )


def _page(request: Any, numbers: Sequence[int]) -> tuple[Sequence[int], str]:
    """Cuts one page out of sorted numbers; the token is the last number of the page before."""
    size = min(request.page_size or PAGE_DEFAULT, PAGE_MAX)
    if request.page_token:
        if not request.page_token.isdecimal() or len(request.page_token) > 20:
            raise InvalidRequest("page_token", "is not one that this daemon gave")
        last = int(request.page_token)
        numbers = [number for number in numbers if number > last]
    page = numbers[:size]
    return page, str(page[-1]) if len(numbers) > len(page) else ""
