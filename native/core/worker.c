/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The worker: drains rings, posts, polls completions, counts. While there is work it spins; after spin_us
 * without any it announces that it sleeps, looks once more, and waits on its doorbells and the provider's fds.
 */
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "barrier.h"
#include "parts.h"

#define POLL_BATCH 64
#define SPIN_IN_FLIGHT_NS 2000000u
/* For watchers of devices, which wake nobody; after that they are looked at every millisecond. */
#define SPIN_POLLED_NS 1000000000u
#define SHORT_SLEEP_NS 50000u
#define SLEEP_MAX_MS 1000 /* nothing depends on it: a net under a lost wake-up */
/* With something to post: a connection that comes up need not tell. With slots free that somebody waits for: they are told. */
#define BUSY_SLEEP_MAX_MS 10
#define EPOLL_BATCH 32

/*
 * On an ordered rail one that belongs to no connection was not told to its sender as landed: it comes again. Not inlined, so that taking an
 * acknowledgement stays short.
 */
static __attribute__((noinline)) void take_imm(struct tfd_worker *worker, struct tfd_rail *rail,
                                               const struct tfd_wc *wc)
{
	struct tfd_conn *conn = wc->owner;

	tfd_store_relaxed(&rail->info.imms_received, rail->info.imms_received + 1);
	if (!conn && rail->info.ordered) {
		worker->dropped_imms++;
		return;
	}
	if (conn && wc->order >= rail->orders) { /* a channel that there is not: the provider is wrong */
		tfd_conns_uncounted(worker, rail, conn);
		return;
	}
	if (conn) {
		conn->orders[wc->order].landed++;
		if (++conn->imms_landed > conn->credits.flood_at)
			tfd_credits_flooded(conn);
	}
	if (tfd_wire_name_space(wc->imm) == TFD_NAME_SPACE_WORKER)
		tfd_channel_arrived(worker, wc);
	else
		tfd_imm_arrived(worker, conn ? conn->peer : 0, wc->imm);
}

/* It is numbered like those that land, and has not: for a while nobody can say of its sender's last posts what became of them. */
static void take_void(const struct tfd_wc *wc)
{
	struct tfd_conn *conn = wc->owner;

	conn->orders[wc->order].landed += wc->imm != 0;
	conn->imms_landed += wc->imm != 0;
	conn->void_until = conn->imms_landed + TFD_VOID_POSTS;
}

void tfd_completion_handle(struct tfd_worker *worker, struct tfd_rail *rail, const struct tfd_wc *wc)
{
	switch (wc->type) {
	case TFD_WC_IMM:
		take_imm(worker, rail, wc);
		break;
	case TFD_WC_VOID:
		take_void(wc);
		break;
	case TFD_WC_ERROR:
		tfd_store_relaxed(&rail->info.errors, rail->info.errors + 1);
		if (wc->wr)
			tfd_wr_done(worker, wc->wr, wc);
		else
			tfd_rail_error(worker, rail, wc);
		break;
	default:
		tfd_wr_done(worker, wc->wr, wc);
		break;
	}
}

static uint32_t poll_rail(struct tfd_worker *worker, struct tfd_rail *rail)
{
	struct tfd_wc wc[POLL_BATCH];
	int count = rail->ops->poll(rail->domain, wc, POLL_BATCH);

	for (uint32_t i = 0; i < (uint32_t)count;) {
		uint32_t acked = tfd_wrs_acked(worker, &wc[i], (uint32_t)count - i);

		if (!acked)
			tfd_completion_handle(worker, rail, &wc[i]);
		i += acked ? acked : 1;
	}
	return (uint32_t)count;
}

static uint32_t drain_rings(struct tfd_worker *worker)
{
	uint32_t did = 0;
	struct tfd_list *link;
	struct tfd_list *next;

	for (link = worker->sessions.next; link != &worker->sessions; link = next) {
		struct tfd_session *session = tfd_container(link, struct tfd_session, link);

		next = link->next;
		if (session->state != TFD_STATE_OPEN || tfd_losses_wait(session))
			continue;
		session->targets_wasted = session->started = 0;
		did += tfd_ring_drain(worker, session, &session->sources[0]);
		if (session->sources[1].ring && session->state == TFD_STATE_OPEN)
			did += tfd_ring_drain(worker, session, &session->sources[1]);
	}
	return did;
}

/* Some page was taken away somewhere: finds whose, so that its owner's peers hear of it. */
static void probe_regions(struct tfd_worker *worker)
{
	struct tfd_list *link;

	worker->guard_hits = tfd_guard_hits();
	for (link = worker->sessions.next; link != &worker->sessions; link = link->next) {
		struct tfd_session *session = tfd_container(link, struct tfd_session, link);

		for (uint32_t i = 0; i < session->regions.capacity; i++) {
			if (session->regions.items[i])
				(void)tfd_region_probe(session->regions.items[i]);
		}
	}
}

/* One pass; whether anything was done. */
uint32_t tfd_worker_poll_hot(struct tfd_worker *worker)
{
	uint32_t did = drain_rings(worker);

	if (!tfd_list_empty(&worker->watched))
		did += tfd_watches_check(worker);
	did += tfd_conns_post(worker);
	for (uint32_t i = 0; i < worker->group->rail_count; i++)
		did += poll_rail(worker, &worker->group->rails[i]);
	if (!tfd_list_empty(&worker->waiting))
		did += tfd_waits_check(worker);
	if (worker->now_ns >= tfd_deadline_next(worker))
		tfd_deadlines_check(worker);
	if (!tfd_list_empty(&worker->mailboxes_ready) && worker->now_ns >= worker->next_mailbox_check_ns)
		tfd_mailboxes_check(worker);
	if (worker->now_ns >= worker->next_pace_ns)
		tfd_paces_check(worker);
	if (worker->now_ns >= worker->next_stall_check_ns)
		tfd_conns_check_progress(worker);
	if (tfd_guard_hits() != worker->guard_hits)
		probe_regions(worker);
	tfd_events_flush(worker);
	return did;
}

static void announce_sleep(struct tfd_worker *worker, uint32_t sleeping)
{
	struct tfd_list *link;

	for (link = worker->sessions.next; link != &worker->sessions; link = link->next) {
		struct tfd_session *session = tfd_container(link, struct tfd_session, link);

		/* pairs with tfd_client_submit and tfd_client_watcher_bump: they store, then look at need_wakeup */
		tfd_store_seq(&session->sources[0].ring->need_wakeup, sleeping);
	}
	tfd_store_seq(&worker->sleeping, sleeping); /* pairs with tfd_command_run, tfd_jobs_submit */
}

static bool source_has_work(const struct tfd_source *source)
{
	return source->ring && tfd_load_seq(&source->ring->tail) != source->head;
}

static bool work_waits(struct tfd_worker *worker)
{
	struct tfd_list *link;

	if (tfd_load_seq(&worker->inbox) || worker->event_count || tfd_watches_ready(worker))
		return true;
	for (link = worker->sessions.next; link != &worker->sessions; link = link->next) {
		struct tfd_session *session = tfd_container(link, struct tfd_session, link);

		if (session->state == TFD_STATE_OPEN &&
		    (source_has_work(&session->sources[0]) || source_has_work(&session->sources[1])))
			return true;
	}
	return false;
}

static bool arm_rails(struct tfd_worker *worker)
{
	for (uint32_t i = 0; i < worker->group->rail_count; i++) {
		if (worker->group->rails[i].ops->arm(worker->group->rails[i].domain) != 0)
			return false;
	}
	return true;
}

static uint64_t spin_least_ns(const struct tfd_worker *worker)
{
	return (uint64_t)worker->core->options.spin_us * 1000;
}

/* For room on its rail, which a connection may have that stands. */
static bool bulk_waits(const struct tfd_worker *worker)
{
	for (uint32_t i = 0; i < worker->group->rail_count; i++) {
		if (!tfd_list_empty(&worker->group->rails[i].round[TFD_PRIORITY_BULK]))
			return true;
	}
	return false;
}

static int sleep_bound_ms(struct tfd_worker *worker)
{
	int bound = SLEEP_MAX_MS;

	for (uint32_t i = 0; i < worker->group->rail_count; i++) {
		if (worker->group->rails[i].wait_fd < 0)
			return 1; /* such a rail must be polled */
	}
	if (worker->polled)
		return 1; /* a device wakes nobody */
	if (!tfd_list_empty(&worker->conns_busy) || !tfd_list_empty(&worker->mailboxes_ready) ||
	    bulk_waits(worker))
		bound = BUSY_SLEEP_MAX_MS;
	if (!tfd_list_empty(&worker->waiting))
		bound = TFD_WAIT_MS;
	if (worker->deadlines.count) {
		uint64_t next = tfd_deadline_next(worker);
		uint64_t left = next > worker->now_ns ? next - worker->now_ns : 0;

		if (left / 1000000 < (uint64_t)bound)
			bound = (int)(left / 1000000) + 1;
	}
	return bound;
}

/*
 * What woke us may be a part of a message that no completion tells of yet: polled for a while. If it came at once, the
 * message is a long one, and falling asleep in the midst of it would cost more than polling longer.
 */
static void look_on(struct tfd_worker *worker, uint64_t before_ns)
{
	worker->active_ns = tfd_now_ns();
	if (worker->active_ns - before_ns > SHORT_SLEEP_NS)
		worker->spin_ns = spin_least_ns(worker);
	else if (worker->spin_ns < SPIN_IN_FLIGHT_NS)
		worker->spin_ns *= 2;
}

static void worker_sleep(struct tfd_worker *worker)
{
	struct epoll_event events[EPOLL_BATCH];
	char ignored[4096];
	uint64_t before_ns = worker->now_ns;
	int count = 0;

	announce_sleep(worker, 1);
	if (!work_waits(worker) && arm_rails(worker))
		count = epoll_wait(worker->epoll_fd, events, EPOLL_BATCH, sleep_bound_ms(worker));
	announce_sleep(worker, 0);
	if (count > 0)
		look_on(worker, before_ns);
	for (int i = 0; i < count; i++) {
		if (events[i].data.u64 >> 32) /* a doorbell of ours or a session's, non-blocking */
			(void)!read((int)(uint32_t)events[i].data.u64, ignored, sizeof(ignored));
	}
}

/* Pieces in flight want progress; but a peer that has stopped must not keep us awake. */
static bool spins(const struct tfd_worker *worker)
{
	uint64_t spin_ns = worker->spin_ns;

	if (worker->inflight_wrs && spin_ns < SPIN_IN_FLIGHT_NS)
		spin_ns = SPIN_IN_FLIGHT_NS;
	if (worker->polled && spin_ns < SPIN_POLLED_NS)
		spin_ns = SPIN_POLLED_NS;
	return worker->core->options.busy || worker->now_ns - worker->active_ns < spin_ns;
}

static void *worker_run(void *argument)
{
	struct tfd_worker *worker = argument;

	while (!worker->stop) {
		bool did;

		worker->now_ns = tfd_now_ns();
		did = tfd_commands_take(worker);
		did = tfd_worker_poll_hot(worker) || did;
		if (did)
			worker->active_ns = worker->now_ns;
		else if (spins(worker))
			(void)sched_yield(); /* the peer of this exchange may need this very core */
		else
			worker_sleep(worker);
	}
	return NULL;
}

static int watch(struct tfd_worker *worker, int fd, bool doorbell)
{
	struct epoll_event event = { .events = EPOLLIN, .data.u64 = (uint64_t)doorbell << 32 | (uint32_t)fd };

	return epoll_ctl(worker->epoll_fd, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

int tfd_worker_watch(struct tfd_worker *worker, int fd)
{
	return watch(worker, fd, true);
}

void tfd_worker_unwatch(struct tfd_worker *worker, int fd)
{
	(void)epoll_ctl(worker->epoll_fd, EPOLL_CTL_DEL, fd, NULL);
}

static int pools_open(struct tfd_worker *worker)
{
	worker->wr_pool = calloc(TFD_WRS_PER_WORKER, sizeof(*worker->wr_pool));
	if (!worker->wr_pool)
		return -ENOMEM;
	for (uint32_t i = 0; i < TFD_WRS_PER_WORKER; i++) {
		worker->wr_pool[i].next = worker->wr_free;
		worker->wr_free = &worker->wr_pool[i];
	}
	return 0;
}

static void pools_close(struct tfd_worker *worker)
{
	tfd_jobs_free(worker);
	tfd_plan_pools_free(worker);
	tfd_heap_fini(&worker->deadlines);
	free(worker->wr_pool);
	while (worker->waiter_free) {
		struct tfd_waiter *waiter = worker->waiter_free;

		worker->waiter_free = waiter->next_free;
		free(waiter);
	}
	tfd_table_fini(&worker->mailboxes);
	free(worker->channels.items);
	free(worker->senders.items);
}

static int fds_open(struct tfd_worker *worker)
{
	int rc;

	worker->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (worker->epoll_fd < 0)
		return -errno;
	worker->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (worker->wake_fd < 0)
		return -errno;
	rc = watch(worker, worker->wake_fd, true);
	for (uint32_t i = 0; !rc && i < worker->group->rail_count; i++) {
		struct tfd_rail *rail = &worker->group->rails[i];

		rail->wait_fd = rail->ops->wait_fd(rail->domain);
		if (rail->wait_fd >= 0)
			rc = watch(worker, rail->wait_fd, false);
	}
	return rc;
}

static void worker_free(struct tfd_worker *worker)
{
	if (worker->epoll_fd >= 0)
		(void)close(worker->epoll_fd);
	if (worker->wake_fd >= 0)
		(void)close(worker->wake_fd);
	pools_close(worker);
	free(worker);
}

int tfd_worker_open(struct tfd_core *core, struct tfd_group *group, struct tfd_error *error)
{
	struct tfd_worker *worker = calloc(1, sizeof(*worker));
	int rc;

	if (!worker)
		return tfd_fail(error, -ENOMEM, "no memory for a worker");
	*worker = (struct tfd_worker){ .core = core, .group = group, .epoll_fd = -1, .wake_fd = -1 };
	tfd_list_init(&worker->sessions);
	tfd_list_init(&worker->conns);
	tfd_list_init(&worker->conns_busy);
	tfd_list_init(&worker->conns_inflight);
	tfd_list_init(&worker->watched);
	tfd_list_init(&worker->mailboxes_ready);
	tfd_list_init(&worker->senders_waiting);
	tfd_list_init(&worker->waiting);
	for (uint32_t i = 0; i < TFD_WAITER_BUCKETS; i++)
		tfd_list_init(&worker->waiters[i]);
	worker->spin_ns = spin_least_ns(worker);
	rc = pools_open(worker);
	if (!rc)
		rc = fds_open(worker);
	if (!rc && !core->options.stepped)
		rc = -pthread_create(&worker->thread, NULL, worker_run, worker);
	if (rc) {
		worker_free(worker);
		return tfd_fail(error, rc, "the worker cannot start: %s", strerror(-rc));
	}
	if (!core->options.stepped)
		(void)pthread_setname_np(worker->thread, "tfd-worker");
	group->worker = worker;
	return 0;
}

static int stop_command(struct tfd_worker *worker, void *argument)
{
	(void)argument;
	worker->stop = true;
	return 0;
}

void tfd_worker_close(struct tfd_worker *worker)
{
	if (!worker)
		return;
	(void)tfd_command_run(worker, stop_command, NULL);
	if (!worker->core->options.stepped)
		(void)pthread_join(worker->thread, NULL);
	worker_free(worker);
}
