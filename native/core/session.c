/* SPDX-License-Identifier: Apache-2.0 */
/* Sessions: their segment, their life from opening to quiet, and control's own submit ring. */
#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "barrier.h"
#include "parts.h"

#define SEGMENT_MAX (1ull << 30)
#define RECORDS_MAX 65536u /* a job id of the client half carries its record in 16 bits */

#define WATCHERS_MAX 65536u
#define PLANS_MAX 65536u

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

struct tfd_session *tfd_session_get(struct tfd_core *core, uint64_t handle)
{
	struct tfd_session *session;

	(void)pthread_mutex_lock(&core->lock);
	session = tfd_table_get(&core->sessions, handle);
	if (session && session->closing)
		session = NULL;
	if (session)
		session->refs++;
	(void)pthread_mutex_unlock(&core->lock);
	return session;
}

void tfd_session_put(struct tfd_session *session)
{
	struct tfd_core *core = session->core;

	(void)pthread_mutex_lock(&core->lock);
	if (--session->refs == 0)
		(void)pthread_cond_broadcast(&core->refs_changed);
	(void)pthread_mutex_unlock(&core->lock);
}

/* ---- opening ---- */

static uint64_t align_line(uint64_t bytes)
{
	return (bytes + TFD_LINE - 1) & ~(uint64_t)(TFD_LINE - 1);
}

static void header_layout(struct tfd_segment_header *header, const struct tfd_session_options *options)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);

	header->magic = TFD_ABI_MAGIC;
	header->abi_version = TFD_ABI_VERSION;
	header->header_bytes = sizeof(*header);
	header->ring_count = 1;
	header->ring_entries = options->ring_entries;
	header->record_count = options->record_count;
	header->counter_count = options->counter_count;
	header->ring_offset = align_line(sizeof(*header));
	header->ring_stride =
		sizeof(struct tfd_ring) + (uint64_t)options->ring_entries * sizeof(struct tfd_entry);
	header->record_offset = header->ring_offset + header->ring_stride;
	header->counter_offset =
		header->record_offset + (uint64_t)options->record_count * sizeof(struct tfd_record);
	header->watcher_count = options->watcher_count;
	header->plan_count = options->plan_count;
	header->watcher_offset =
		header->counter_offset + (uint64_t)options->counter_count * sizeof(struct tfd_counter);
	header->arena_offset =
		header->watcher_offset + (uint64_t)options->watcher_count * sizeof(struct tfd_watcher);
	header->arena_bytes = options->arena_bytes;
	header->segment_bytes = (header->arena_offset + header->arena_bytes + page - 1) / page * page;
	header->session_id = options->session_id;
	header->state = TFD_SESSION_OPEN;
}

static bool power_of_two(uint32_t n)
{
	return n && !(n & (n - 1));
}

static int check_options(struct tfd_core *core, const struct tfd_session_options *options,
                         struct tfd_error *error)
{
	if (options->group >= core->group_count)
		return tfd_fail(error, -EINVAL, "there is no domain group %u", options->group);
	if (!power_of_two(options->ring_entries) || !power_of_two(options->record_count) ||
	    options->record_count > RECORDS_MAX || options->ring_entries > RECORDS_MAX)
		return tfd_fail(error, -EINVAL,
		                "%u ring entries and %u records: each must be a power of two up to %u",
		                options->ring_entries, options->record_count, RECORDS_MAX);
	if (!options->counter_count || options->counter_count > TFD_IMM_COUNT ||
	    options->watcher_count > WATCHERS_MAX || options->plan_count > PLANS_MAX ||
	    options->arena_bytes > SEGMENT_MAX)
		return tfd_fail(error, -EINVAL,
		                "%u counters, %u watchers, %u plans or %llu arena bytes are out of range",
		                options->counter_count, options->watcher_count, options->plan_count,
		                (unsigned long long)options->arena_bytes);
	if (options->weight > TFD_WEIGHT_MAX)
		return tfd_fail(error, -EINVAL, "a weight of %u is more than %u", options->weight,
		                TFD_WEIGHT_MAX);
	return 0;
}

static int segment_open(struct tfd_session *session, const struct tfd_session_options *options)
{
	struct tfd_segment_header header = { 0 };
	struct tfd_core *core = session->core;
	void *segment;

	header_layout(&header, options);
	memcpy(header.daemon_id, core->options.daemon_id, sizeof(header.daemon_id));
	memcpy(header.boot_epoch, core->options.boot_epoch, sizeof(header.boot_epoch));
	memcpy(header.provider, session->group->rails[0].info.provider, sizeof(header.provider));
	header.heartbeat_ns = tfd_now_ns();
	session->segment_bytes = header.segment_bytes;
	session->segment_fd = memfd_create("transferd-session", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (session->segment_fd < 0)
		return -errno;
	if (ftruncate(session->segment_fd, (off_t)header.segment_bytes) != 0 ||
	    fcntl(session->segment_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0)
		return -errno;
	segment =
		mmap(NULL, header.segment_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, session->segment_fd, 0);
	if (segment == MAP_FAILED)
		return -errno;
	session->segment = segment;
	session->header = segment;
	*session->header = header;
	return 0;
}

static int tables_open(struct tfd_session *session, const struct tfd_session_options *options)
{
	struct tfd_segment_header *header = session->header;
	struct tfd_source *source = &session->sources[0];

	source->ring = (struct tfd_ring *)(void *)(session->segment + header->ring_offset);
	source->entries = (struct tfd_entry *)(void *)(source->ring + 1);
	source->records = (struct tfd_record *)(void *)(session->segment + header->record_offset);
	source->entry_mask = options->ring_entries - 1;
	source->record_count = options->record_count;
	source->arena = session->segment + header->arena_offset;
	source->arena_bytes = options->arena_bytes;
	session->counters = (struct tfd_counter *)(void *)(session->segment + header->counter_offset);
	session->counter_count = options->counter_count;
	source->in_flight = calloc(options->record_count, sizeof(struct tfd_job *));
	session->counts = calloc(options->counter_count, sizeof(*session->counts));
	session->wake_counters = calloc((options->counter_count + 63) / 64, sizeof(uint64_t));
	session->wake_records = calloc((options->record_count + 63) / 64, sizeof(uint64_t));
	if (!source->in_flight || !session->counts || !session->wake_counters || !session->wake_records)
		return -ENOMEM;
	if (tfd_plans_open(session, options->plan_count) != 0)
		return -ENOMEM;
	return tfd_watches_open(session,
	                        (struct tfd_watcher *)(void *)(session->segment + header->watcher_offset),
	                        options->watcher_count);
}

static int fds_open(struct tfd_session *session)
{
	if (pipe2(session->doorbell, O_CLOEXEC | O_NONBLOCK) != 0 ||
	    pipe2(session->event, O_CLOEXEC | O_NONBLOCK) != 0)
		return -errno;
	session->control_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return session->control_fd < 0 ? -errno : 0;
}

static void close_fd(int fd)
{
	if (fd >= 0)
		(void)close(fd);
}

/* Tables of entries that nobody takes any more: control submitted them while the session, or the core, ended. */
static void put_waiting_tables(struct tfd_source *source)
{
	uint32_t tail = source->ring ? tfd_load_relaxed(&source->ring->tail) : source->head;

	for (; source->head != tail; source->head++) {
		struct tfd_tables *tables = source->tables[source->head & source->entry_mask];

		if (tables)
			tfd_tables_put(source, tables);
	}
	tfd_tables_free(source);
}

static void session_free(struct tfd_session *session)
{
	if (session->segment)
		(void)munmap(session->segment, session->segment_bytes);
	close_fd(session->segment_fd);
	for (int i = 0; i < 2; i++) {
		close_fd(session->doorbell[i]);
		close_fd(session->event[i]);
	}
	close_fd(session->control_fd);
	for (uint32_t i = 0; i < TFD_IMM_COUNT / TFD_IMM_PAGE; i++)
		free(session->imm_pages[i]);
	for (int i = 0; i < 2; i++)
		free(session->sources[i].in_flight);
	put_waiting_tables(&session->sources[1]);
	tfd_fractions_free(session);
	tfd_watches_free(session);
	tfd_plans_free(session);
	free(session->sources[1].tables);
	free(session->sources[1].ring);
	free(session->sources[1].records);
	free(session->counts);
	free(session->wake_counters);
	free(session->wake_records);
	free(session->flows);
	tfd_table_fini(&session->regions);
	tfd_table_fini(&session->opens);
	free(session);
}

static int attach_command(struct tfd_worker *worker, void *argument)
{
	struct tfd_session *session = argument;
	int rc = tfd_worker_watch(worker, session->doorbell[0]);

	if (rc)
		return rc;
	tfd_list_push(&worker->sessions, &session->link);
	worker->name_spaces[session->name_space] = session;
	return 0;
}

static int name_space_take_locked(struct tfd_core *core, uint32_t *name_space)
{
	uint32_t limit = core->options.max_sessions;

	for (uint32_t i = 0; i < limit; i++) {
		uint32_t candidate = 1 + (core->name_space_next + i) % limit; /* the longest unused first */

		if (!core->name_space_used[candidate]) {
			core->name_space_used[candidate] = 1;
			core->name_space_next = candidate % limit;
			*name_space = candidate;
			return 0;
		}
	}
	return -EMFILE;
}

static int session_enter(struct tfd_core *core, struct tfd_session *session, struct tfd_error *error)
{
	int rc;

	(void)pthread_mutex_lock(&core->lock);
	rc = name_space_take_locked(core, &session->name_space);
	if (!rc) {
		rc = tfd_table_add(&core->sessions, session, &session->handle);
		if (rc)
			core->name_space_used[session->name_space] = 0;
	}
	(void)pthread_mutex_unlock(&core->lock);
	if (rc == -EMFILE)
		return tfd_fail(error, rc, "the daemon has all its %u sessions; end one, or raise the limit",
		                core->options.max_sessions);
	return rc ? tfd_fail(error, rc, "no memory for a session") : 0;
}

static void session_leave(struct tfd_core *core, struct tfd_session *session)
{
	(void)pthread_mutex_lock(&core->lock);
	(void)tfd_table_remove(&core->sessions, session->handle);
	core->name_space_used[session->name_space] = 0;
	(void)pthread_mutex_unlock(&core->lock);
}

static struct tfd_session *session_new(struct tfd_core *core, uint32_t group)
{
	struct tfd_session *session = calloc(1, sizeof(*session));

	if (!session)
		return NULL;
	session->core = core;
	session->group = core->groups[group];
	session->segment_fd = session->control_fd = -1;
	session->doorbell[0] = session->doorbell[1] = session->event[0] = session->event[1] = -1;
	session->counter_free = TFD_NO_SLOT;
	tfd_list_init(&session->jobs);
	tfd_list_init(&session->mailboxes);
	tfd_list_init(&session->link);
	return session;
}

int tfd_session_open(struct tfd_core *core, const struct tfd_session_options *options, uint64_t *handle,
                     struct tfd_session_fds *fds, struct tfd_error *error)
{
	struct tfd_session *session;
	int rc = check_options(core, options, error);

	if (rc)
		return rc;
	session = session_new(core, options->group);
	if (!session)
		return tfd_fail(error, -ENOMEM, "no memory for a session");
	rc = segment_open(session, options);
	if (!rc)
		rc = fds_open(session);
	if (!rc)
		rc = tables_open(session, options);
	if (!rc)
		rc = tfd_flows_open(session, options->weight ? options->weight : 1);
	if (rc) {
		rc = tfd_fail(error, rc, "the session's segment cannot be made: %s", strerror(-rc));
		goto err_free;
	}
	rc = session_enter(core, session, error);
	if (rc)
		goto err_free;
	rc = tfd_command_run(session->group->worker, attach_command, session);
	if (rc) {
		rc = tfd_fail(error, rc, "the worker cannot watch the session: %s", strerror(-rc));
		goto err_leave;
	}
	*handle = session->handle;
	fds->segment_fd = fcntl(session->segment_fd, F_DUPFD_CLOEXEC, 0);
	fds->doorbell_fd = fcntl(session->doorbell[1], F_DUPFD_CLOEXEC, 0);
	fds->event_fd = fcntl(session->event[0], F_DUPFD_CLOEXEC, 0);
	if (fds->segment_fd < 0 || fds->doorbell_fd < 0 || fds->event_fd < 0) {
		close_fd(fds->segment_fd);
		close_fd(fds->doorbell_fd);
		close_fd(fds->event_fd);
		(void)tfd_session_end(core, *handle, TFD_DETAIL_SESSION_ENDED);
		(void)tfd_session_close(core, *handle);
		return tfd_fail(error, -EMFILE, "no file descriptor is left");
	}
	return 0;

err_leave:
	session_leave(core, session);
err_free:
	session_free(session);
	return rc;
}

int tfd_session_sealed(struct tfd_core *core, uint64_t handle)
{
	struct tfd_session *session = tfd_session_get(core, handle);
	int rc;

	if (!session)
		return -ENOENT;
	rc = fcntl(session->segment_fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE | F_SEAL_SEAL) ? -errno : 0;
	tfd_session_put(session);
	return rc;
}

/* ---- ending ---- */

void tfd_session_quiet_if_idle(struct tfd_session *session)
{
	struct tfd_event event = { .type = TFD_EVENT_SESSION_QUIET, .id = session->handle };

	if (session->state != TFD_STATE_ENDING || session->job_count)
		return;
	tfd_store_relaxed(&session->state, TFD_STATE_QUIET);
	tfd_event_post(session->group->worker, &event);
}

/* Ends what control has submitted and the worker has not taken yet. */
static void cancel_waiting(struct tfd_session *session, uint32_t detail)
{
	struct tfd_source *source = &session->sources[1];

	if (!source->ring)
		return;
	for (; source->head != tfd_load_acquire(&source->ring->tail);
	     source->head++) { /* pairs with tfd_jobs_submit */
		uint32_t index = source->head & source->entry_mask;

		if (source->tables[index])
			tfd_tables_put(source, source->tables[index]);
		tfd_entry_end(session, source, &source->entries[index], TFD_JOB_CANCELLED, detail);
	}
}

/* At most one ring: a client that goes on publishing does not hold the worker. */
static void take_published(struct tfd_worker *worker, struct tfd_session *session, struct tfd_source *source)
{
	uint32_t taken = 0;

	while (session->state == TFD_STATE_OPEN && taken <= source->entry_mask) {
		uint32_t done = tfd_ring_drain(worker, session, source);

		if (!done)
			return;
		taken += done;
	}
}

/* What was submitted before a fence and not taken yet must not go out after it. */
void tfd_session_take_published(struct tfd_worker *worker, struct tfd_session *session)
{
	take_published(worker, session, &session->sources[0]);
	if (session->sources[1].ring)
		take_published(worker, session, &session->sources[1]);
}

struct end_call {
	struct tfd_session *session;
	uint32_t detail;
};

static int end_command(struct tfd_worker *worker, void *argument)
{
	struct end_call *call = argument;
	struct tfd_session *session = call->session;
	struct tfd_list *link;
	struct tfd_list *next;

	if (session->state >= TFD_STATE_ENDING)
		return 0;
	take_published(worker, session,
	               &session->sources[0]); /* cancelled like any other job: their loss is told */
	tfd_store_relaxed(&session->state, TFD_STATE_ENDING);
	cancel_waiting(session, call->detail);
	session->header->end_reason = call->detail;
	/* pairs with the client's acquire of state: end_reason */
	tfd_store_release(&session->header->state, TFD_SESSION_ENDED);
	for (link = session->jobs.next; link != &session->jobs; link = next) {
		struct tfd_job *job = tfd_container(link, struct tfd_job, link);

		next = link->next;
		tfd_job_fail(job, TFD_JOB_CANCELLED, call->detail);
		tfd_job_finish_if_quiet(job);
	}
	tfd_session_quiet_if_idle(session);
	return 0;
}

int tfd_session_end(struct tfd_core *core, uint64_t handle, uint32_t detail)
{
	struct end_call call = { .session = tfd_session_get(core, handle), .detail = detail };

	if (!call.session)
		return -ENOENT;
	(void)tfd_command_run(call.session->group->worker, end_command, &call);
	tfd_session_put(call.session);
	return 0;
}

/* Takes the session from the worker, with what only the worker may free. */
static int detach_command(struct tfd_worker *worker, void *argument)
{
	struct tfd_session *session = argument;

	if (session->state != TFD_STATE_QUIET)
		return -EBUSY;
	worker->name_spaces[session->name_space] = NULL;
	tfd_list_remove(&session->link);
	tfd_worker_unwatch(worker, session->doorbell[0]);
	tfd_mailboxes_free(session, worker);
	for (uint32_t i = 0; i < session->plan_count; i++)
		tfd_plan_remove(session, i);
	for (uint32_t i = 0; i < session->regions.capacity; i++) {
		if (session->regions.items[i])
			tfd_region_unlink(session->regions.items[i]);
	}
	for (uint32_t i = 0; i < session->opens.capacity; i++) {
		if (!session->opens.items[i])
			continue;
		tfd_sender_give(worker, session->opens.items[i]);
		tfd_open_destroy(session->opens.items[i]);
	}
	return 0;
}

static void session_destroy(struct tfd_core *core, struct tfd_session *session)
{
	tfd_waker_drain(core);
	for (uint32_t i = 0; i < session->regions.capacity; i++) {
		if (session->regions.items[i])
			tfd_region_destroy(session->regions.items[i]);
	}
	session_leave(core, session);
	session_free(session);
}

int tfd_session_close(struct tfd_core *core, uint64_t handle)
{
	struct tfd_session *session;
	int rc;

	(void)pthread_mutex_lock(&core->lock);
	session = tfd_table_get(&core->sessions, handle);
	if (!session || session->closing) {
		(void)pthread_mutex_unlock(&core->lock);
		return -ENOENT;
	}
	session->closing = true; /* no new caller comes in; those inside leave within a bound */
	while (session->refs)
		(void)pthread_cond_wait(&core->refs_changed, &core->lock);
	(void)pthread_mutex_unlock(&core->lock);
	rc = tfd_command_run(session->group->worker, detach_command, session);
	if (rc) {
		(void)pthread_mutex_lock(&core->lock);
		session->closing = false;
		(void)pthread_mutex_unlock(&core->lock);
		return rc;
	}
	session_destroy(core, session);
	return 0;
}

/* Once the workers have stopped. */
void tfd_sessions_close_all(struct tfd_core *core)
{
	for (uint32_t i = 0; i < core->sessions.capacity; i++) {
		struct tfd_session *session = core->sessions.items[i];

		if (!session)
			continue;
		for (uint32_t k = 0; k < session->opens.capacity; k++) {
			if (session->opens.items[k])
				tfd_open_destroy(session->opens.items[k]);
		}
		tfd_mailboxes_free(session, NULL);
		tfd_jobs_discard(session);
		session->header->end_reason = TFD_DETAIL_SESSION_ENDED;
		tfd_store_release(&session->header->state, TFD_SESSION_ENDED);
		session_destroy(core, session);
	}
}

/* ---- what control asks ---- */

int tfd_session_name_space(struct tfd_core *core, uint64_t handle, uint32_t *name_space)
{
	struct tfd_session *session = tfd_session_get(core, handle);

	if (!session)
		return -ENOENT;
	*name_space = session->name_space;
	tfd_session_put(session);
	return 0;
}

int tfd_session_stat(struct tfd_core *core, uint64_t handle, struct tfd_session_info *out)
{
	struct tfd_session *session = tfd_session_get(core, handle);

	if (!session)
		return -ENOENT;
	out->jobs_ended = tfd_load_relaxed(&session->stat.jobs_ended);
	out->jobs_failed = tfd_load_relaxed(&session->stat.jobs_failed);
	out->jobs_in_flight = tfd_load_relaxed(&session->stat.jobs_in_flight);
	out->bytes_sent = tfd_load_relaxed(&session->stat.bytes_sent);
	out->imms_received = tfd_load_relaxed(&session->stat.imms_received);
	tfd_session_put(session);
	return 0;
}

static int watch_command(struct tfd_worker *worker, void *argument)
{
	(void)worker;
	((struct tfd_session *)argument)->control_watch = true;
	return 0;
}

int tfd_session_watch_fd(struct tfd_core *core, uint64_t handle)
{
	struct tfd_session *session = tfd_session_get(core, handle);
	int fd;

	if (!session)
		return -ENOENT;
	(void)tfd_command_run(session->group->worker, watch_command, session);
	fd = session->control_fd;
	tfd_session_put(session);
	return fd;
}
