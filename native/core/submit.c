/* SPDX-License-Identifier: Apache-2.0 */
/* Control's own submit ring: what clients send by gRPC goes through the same validation as what they write into memory. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "barrier.h"
#include "parts.h"

static int source_command(struct tfd_worker *worker, void *argument)
{
	struct tfd_session *session = argument;
	struct tfd_source source = { .entry_mask = TFD_CONTROL_ENDS - 1,
	                             .record_count = TFD_CONTROL_ENDS,
	                             .control = true };

	(void)worker;
	if (session->sources[1].ring)
		return 0;
	source.ring = aligned_alloc(TFD_LINE,
	                            sizeof(struct tfd_ring) + TFD_CONTROL_ENDS * sizeof(struct tfd_entry));
	source.records = aligned_alloc(TFD_LINE, TFD_CONTROL_ENDS * sizeof(struct tfd_record));
	source.in_flight = calloc(TFD_CONTROL_ENDS, sizeof(struct tfd_job *));
	source.tables = calloc(TFD_CONTROL_ENDS, sizeof(struct tfd_tables *));
	if (!source.ring || !source.records || !source.in_flight || !source.tables) {
		free(source.tables);
		free(source.ring);
		free(source.records);
		free(source.in_flight);
		return -ENOMEM;
	}
	memset(source.ring, 0, sizeof(*source.ring));
	memset(source.records, 0, TFD_CONTROL_ENDS * sizeof(struct tfd_record));
	source.entries = (struct tfd_entry *)(void *)(source.ring + 1);
	session->sources[1] = source;
	return 0;
}

/* Room is where the job that had the record before has ended. */
static bool records_free(struct tfd_source *source, uint64_t first, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		uint64_t id = first + i;
		const struct tfd_record *record = &source->records[id % TFD_CONTROL_ENDS];

		if (id > TFD_CONTROL_ENDS && tfd_load_acquire(&record->done_id) !=
		                                     id - TFD_CONTROL_ENDS) /* pairs with tfd_record_end */
			return false;
	}
	return true;
}

/* Worker: a job is done with its tables. Control frees them: a worker does not. */
void tfd_tables_put(struct tfd_source *source, struct tfd_tables *tables)
{
	struct tfd_tables *top;

	if (--tables->refs)
		return;
	top = tfd_load_relaxed(&source->tables_done);
	do
		tables->next = top;
	while (!tfd_replace_seq(&source->tables_done, &top, tables));
}

void tfd_tables_free(struct tfd_source *source)
{
	struct tfd_tables *tables = tfd_swap_seq(&source->tables_done, NULL);

	while (tables) {
		struct tfd_tables *next = tables->next;

		source->tables_bytes -= tables->bytes;
		free(tables);
		tables = next;
	}
}

static struct tfd_tables *tables_copy(const void *data, size_t bytes, uint32_t refs)
{
	struct tfd_tables *tables = malloc(sizeof(*tables) + bytes);

	if (!tables)
		return NULL;
	tables->refs = refs;
	tables->bytes = bytes;
	memcpy(tables->data, data, bytes);
	return tables;
}

static int publish_locked(struct tfd_session *session, struct tfd_entry *entries, uint32_t count,
                          struct tfd_tables *tables)
{
	struct tfd_source *source = &session->sources[1];
	uint32_t tail = tfd_load_relaxed(&source->ring->tail);
	uint32_t head = tfd_load_acquire(&source->ring->head); /* pairs with tfd_ring_drain */

	if (count > source->entry_mask + 1 - (tail - head) ||
	    !records_free(source, session->next_control_job + 1, count))
		return -EAGAIN;
	if (tables && source->tables_bytes && source->tables_bytes + tables->bytes > TFD_CONTROL_TABLES)
		return -EAGAIN;
	source->tables_bytes += tables ? tables->bytes : 0;
	for (uint32_t i = 0; i < count; i++) {
		uint64_t id = session->next_control_job + 1 + i;

		entries[i].job_id = id;
		entries[i].record = (uint32_t)(id % TFD_CONTROL_ENDS);
		source->entries[(tail + i) & source->entry_mask] = entries[i];
		source->tables[(tail + i) & source->entry_mask] = tables;
	}
	tfd_store_relaxed(&session->next_control_job, session->next_control_job + count);
	/* Publishes the entries, pairs with tfd_ring_drain; seq against worker->sleeping (worker_sleep). */
	tfd_store_seq(&source->ring->tail, tail + count);
	return 0;
}

int tfd_jobs_submit(struct tfd_core *core, uint64_t handle, struct tfd_entry *entries, uint32_t count,
                    const void *data, size_t bytes)
{
	struct tfd_session *session = tfd_session_get(core, handle);
	struct tfd_tables *tables = NULL;
	struct tfd_worker *worker;
	uint64_t one = 1;
	int rc;

	if (!session)
		return -ENOENT;
	if (count > TFD_CONTROL_ENDS) {
		tfd_session_put(session);
		return -E2BIG;
	}
	worker = session->group->worker;
	rc = tfd_load_relaxed(&session->control_ready) ? 0 : tfd_command_run(worker, source_command, session);
	if (!rc && bytes && count) {
		tables = tables_copy(data, bytes, count);
		rc = tables ? 0 : -ENOMEM;
	}
	if (!rc) {
		(void)pthread_mutex_lock(&core->lock);
		tfd_store_relaxed(&session->control_ready, 1);
		tfd_tables_free(&session->sources[1]);
		rc = publish_locked(session, entries, count, tables);
		(void)pthread_mutex_unlock(&core->lock);
		if (rc)
			free(tables);
	}
	/* After publishing: whoever ends the session has cancelled the entries, or will never look at them. */
	if (!rc && tfd_load_relaxed(&session->state) != TFD_STATE_OPEN)
		rc = -ESHUTDOWN;
	if (!rc && tfd_load_seq(&worker->sleeping))
		(void)!write(worker->wake_fd, &one, sizeof(one));
	tfd_session_put(session);
	return rc;
}
