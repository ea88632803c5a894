/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ImmCounters. The worker counts in private eighths; the segment gets whole writes. value, gate, faults and
 * lost in the segment are copies that a client may scribble over without any effect on what is published next.
 */
#include <errno.h>
#include <stdlib.h>

#include "barrier.h"
#include "parts.h"

static void counter_publish(struct tfd_session *session, uint32_t slot)
{
	struct tfd_count *count = &session->counts[slot];
	struct tfd_counter *shared = &session->counters[slot];
	uint64_t value = count->value;

	/* Seq stores, before the waker's look at `waiters`; pairs with tfd_client_counter_wait. */
	tfd_store_relaxed(&shared->lost, count->lost);
	tfd_store_release(&shared->acknowledged, count->acknowledged);
	tfd_store_seq(&shared->faults, count->faults);
	tfd_store_seq(&shared->value, value);
	/* Once, however many faults there are: more would wrap, and signed comparisons would not be released. */
	tfd_store_release(&shared->gate, value + (count->faults != count->acknowledged ? TFD_GATE_FAULT : 0));
	tfd_wake_counter(session, slot);
}

/* Whole writes that the private sum has reached; what was taken out again does not show. Whether there are more than before. */
static bool count_raise(struct tfd_count *count)
{
	int64_t whole = count->eighths >> 3;

	if (whole <= (int64_t)count->value)
		return false;
	count->value = (uint64_t)whole;
	return true;
}

/* ---- what peers have landed of cut writes ---- */

static struct tfd_fraction **fraction_find(struct tfd_session *session, uint32_t slot, uint64_t peer)
{
	struct tfd_fraction **at = &session->fractions[slot % TFD_FRACTION_BUCKETS];

	while (*at && ((*at)->slot != slot || (*at)->peer != peer))
		at = &(*at)->next;
	return at;
}

static void fraction_drop(struct tfd_worker *worker, struct tfd_fraction **at)
{
	struct tfd_fraction *fraction = *at;

	*at = fraction->next;
	fraction->next = worker->fraction_free;
	worker->fraction_free = fraction;
}

/* Adds `units`, which may be negative; without memory the peer's death leaves a part behind, and says so by its fault. */
static void fraction_add(struct tfd_session *session, uint32_t slot, uint64_t peer, int64_t units)
{
	struct tfd_worker *worker = session->group->worker;
	struct tfd_fraction **at = fraction_find(session, slot, peer);
	struct tfd_fraction *fraction = *at;

	if (!(units & 7) || !peer)
		return;
	if (!fraction) {
		fraction = worker->fraction_free;
		if (fraction)
			worker->fraction_free = fraction->next;
		else
			fraction = malloc(sizeof(*fraction));
		if (!fraction)
			return;
		*fraction = (struct tfd_fraction){ .peer = peer, .slot = slot };
		*at = fraction;
	}
	fraction->units = (uint32_t)((int64_t)fraction->units + units) & 7;
	if (!fraction->units)
		fraction_drop(worker, at);
}

void tfd_fractions_free(struct tfd_session *session)
{
	for (uint32_t i = 0; i < TFD_FRACTION_BUCKETS; i++) {
		while (session->fractions[i]) {
			struct tfd_fraction *fraction = session->fractions[i];

			session->fractions[i] = fraction->next;
			free(fraction);
		}
	}
}

/* ---- counting ---- */

void tfd_imm_arrived(struct tfd_worker *worker, uint64_t peer, uint32_t wire)
{
	uint32_t imm = wire & (TFD_IMM_COUNT - 1);
	struct tfd_session *session = worker->name_spaces[(wire >> TFD_IMM_BITS) & (TFD_NAME_SPACES - 1)];
	uint32_t slot = session ? tfd_counter_find(session, imm) : TFD_NO_SLOT;
	uint32_t units = tfd_weight_units(wire >> 29);
	struct tfd_count *count;
	uint64_t old;

	if (slot == TFD_NO_SLOT) {
		worker->dropped_imms++;
		return;
	}
	count = &session->counts[slot];
	old = count->value;
	count->eighths += units;
	if (units < 8)
		fraction_add(session, slot, peer, units);
	if (!count_raise(count))
		return;
	tfd_store_relaxed(&session->stat.imms_received, session->stat.imms_received + count->value - old);
	counter_publish(session, slot);
}

uint32_t tfd_counter_find(const struct tfd_session *session, uint32_t imm)
{
	const uint32_t *page = session->imm_pages[imm / TFD_IMM_PAGE];

	return page ? page[imm % TFD_IMM_PAGE] : TFD_NO_SLOT;
}

int tfd_counter_give_unnamed(struct tfd_session *session, uint32_t *slot)
{
	uint32_t given = session->counter_free;

	if (given != TFD_NO_SLOT) {
		session->counter_free = session->counts[given].imm;
	} else {
		if (session->counters_used == session->counter_count)
			return -ENOSPC;
		given = session->counters_used++;
	}
	session->counts[given].imm = session->counters[given].imm = TFD_IMM_COUNT; /* nobody's */
	session->counts[given].in_use = true;
	session->counts[given].acknowledged = session->counts[given].faults; /* of who had it before */
	counter_publish(session, given);
	tfd_store_release(&session->counters[given].in_use, 1);
	*slot = given;
	return 0;
}

void tfd_counter_return(struct tfd_session *session, uint32_t slot)
{
	session->counts[slot].in_use = false;
	session->counts[slot].imm = session->counter_free;
	session->counter_free = slot;
}

void tfd_counter_add(struct tfd_session *session, uint32_t slot)
{
	session->counts[slot].eighths += 8;
	if (count_raise(&session->counts[slot]))
		counter_publish(session, slot);
}

int tfd_counter_give(struct tfd_session *session, uint32_t imm, uint32_t *slot)
{
	uint32_t **page = &session->imm_pages[imm / TFD_IMM_PAGE];
	struct tfd_counter *shared;

	*slot = tfd_counter_find(session, imm);
	if (*slot != TFD_NO_SLOT)
		return 0;
	if (session->counters_used == session->counter_count)
		return -ENOSPC;
	if (!*page) {
		*page = malloc(TFD_IMM_PAGE * sizeof(**page));
		if (!*page)
			return -ENOMEM;
		for (uint32_t i = 0; i < TFD_IMM_PAGE; i++)
			(*page)[i] = TFD_NO_SLOT;
	}
	*slot = session->counters_used++;
	session->counts[*slot].imm = imm;
	session->counts[*slot].in_use = true;
	shared = &session->counters[*slot];
	shared->imm = imm;
	tfd_store_release(&shared->in_use, 1); /* pairs with readers that look for their imm's slot */
	(*page)[imm % TFD_IMM_PAGE] = *slot;
	return 0;
}

void tfd_counter_fault(struct tfd_session *session, uint32_t slot, uint64_t lost, uint64_t units,
                       uint64_t peer)
{
	session->counts[slot].eighths -= (int64_t)units;
	/* An unordered rail does not tell whose an immediate is: nothing was added for that peer. */
	if (session->group->rails[0].info.ordered)
		fraction_add(session, slot, peer, -(int64_t)units);
	session->counts[slot].faults++;
	session->counts[slot].lost += lost;
	counter_publish(session, slot);
}

void tfd_counter_acknowledge(struct tfd_session *session, uint32_t slot)
{
	session->counts[slot].acknowledged = session->counts[slot].faults;
	counter_publish(session, slot);
}

/* ---- control's calls ---- */

struct counters_call {
	struct tfd_session *session;
	uint32_t first;
	uint32_t count;
	uint64_t lost;
	uint64_t units;
	uint64_t peer;
	uint32_t *slots;
	struct tfd_counter_state *state;
};

static int add_command(struct tfd_worker *worker, void *argument)
{
	struct counters_call *call = argument;
	struct tfd_session *session = call->session;
	uint32_t missing = 0;
	int rc = 0;

	(void)worker;
	if (call->count > session->counter_count)
		return -ENOSPC;
	for (uint32_t i = 0; i < call->count; i++)
		missing += tfd_counter_find(session, call->first + i) == TFD_NO_SLOT;
	if (missing > session->counter_count - session->counters_used)
		return -ENOSPC;
	for (uint32_t i = 0; !rc && i < call->count; i++)
		rc = tfd_counter_give(session, call->first + i, &call->slots[i]);
	return rc;
}

static int fault_command(struct tfd_worker *worker, void *argument)
{
	struct counters_call *call = argument;

	(void)worker;
	for (uint32_t i = 0; i < call->count; i++) {
		uint32_t slot = tfd_counter_find(call->session, call->first + i);

		if (slot != TFD_NO_SLOT)
			tfd_counter_fault(call->session, slot, call->lost, call->units, call->peer);
	}
	return 0;
}

static int read_command(struct tfd_worker *worker, void *argument)
{
	struct counters_call *call = argument;
	uint32_t slot = tfd_counter_find(call->session, call->first);
	const struct tfd_count *count;

	(void)worker;
	if (slot == TFD_NO_SLOT)
		return -ENOENT;
	count = &call->session->counts[slot];
	if (call->slots)
		*call->slots = slot;
	if (call->state)
		*call->state = (struct tfd_counter_state){ .value = count->value,
		                                           .faults = count->faults,
		                                           .lost = count->lost,
		                                           .acknowledged = count->acknowledged };
	return 0;
}

static int counters_call(struct tfd_core *core, uint64_t handle, struct counters_call *call,
                         int (*run)(struct tfd_worker *, void *))
{
	int rc;

	if (call->count > TFD_IMM_COUNT || call->first > TFD_IMM_COUNT - call->count)
		return -ERANGE;
	call->session = tfd_session_get(core, handle);
	if (!call->session)
		return -ENOENT;
	rc = tfd_command_run(call->session->group->worker, run, call);
	tfd_session_put(call->session);
	return rc;
}

int tfd_counters_add(struct tfd_core *core, uint64_t session, uint32_t first, uint32_t count, uint32_t *slots)
{
	struct counters_call call = { .first = first, .count = count, .slots = slots };

	return counters_call(core, session, &call, add_command);
}

int tfd_counter_slot(struct tfd_core *core, uint64_t session, uint32_t imm, uint32_t *slot)
{
	struct counters_call call = { .first = imm, .count = 1, .slots = slot };

	return counters_call(core, session, &call, read_command);
}

static int settle_command(struct tfd_worker *worker, void *argument)
{
	const uint64_t *peer = argument;

	for (struct tfd_list *link = worker->sessions.next; link != &worker->sessions; link = link->next) {
		struct tfd_session *session = tfd_container(link, struct tfd_session, link);

		for (uint32_t i = 0; i < TFD_FRACTION_BUCKETS; i++) {
			struct tfd_fraction **at = &session->fractions[i];

			while (*at) {
				if ((*at)->peer != *peer) {
					at = &(*at)->next;
					continue;
				}
				session->counts[(*at)->slot].eighths -= (*at)->units;
				fraction_drop(worker, at);
			}
		}
	}
	return 0;
}

int tfd_counters_settle(struct tfd_core *core, uint64_t peer)
{
	int rc = 0;

	for (uint32_t i = 0; !rc && i < core->group_count; i++)
		rc = tfd_command_run(core->groups[i]->worker, settle_command, &peer);
	return rc;
}

int tfd_counters_fault(struct tfd_core *core, uint64_t session, uint32_t first, uint32_t count, uint64_t lost,
                       uint64_t units, uint64_t peer)
{
	struct counters_call call = {
		.first = first, .count = count, .lost = lost, .units = units, .peer = peer
	};

	return counters_call(core, session, &call, fault_command);
}

int tfd_counter_read(struct tfd_core *core, uint64_t session, uint32_t imm, struct tfd_counter_state *out)
{
	struct counters_call call = { .first = imm, .count = 1, .state = out };

	return counters_call(core, session, &call, read_command);
}
