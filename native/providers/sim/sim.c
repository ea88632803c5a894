/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The simulated fabric. A posted piece is a flight: it lands when its time has come, at a poll of the sender's domain, and is
 * acknowledged later still. One lock for the whole fabric: domains are polled by their workers' threads, or all by a test.
 */
#include "fabric.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FLIGHTS_MAX 4096u

uint32_t tfd_sim_fabric_lock;
static struct tfd_list fabric_domains = { &fabric_domains, &fabric_domains };
static uint64_t fabric_names;
static uint64_t fabric_overruns;
static uint64_t fabric_now_ns; /* 0: real time */

void tfd_sim_lock(void)
{
	while (!tfd_sim_try_lock())
		(void)sched_yield();
}

uint64_t tfd_sim_now_locked(void)
{
	return fabric_now_ns ? fabric_now_ns : tfd_now_ns();
}

uint64_t tfd_sim_random_locked(struct tfd_domain *domain)
{
	domain->random = domain->random * 6364136223846793005ull + 1442695040888963407ull;
	return domain->random >> 33;
}

struct tfd_half *tfd_sim_find_locked(uint64_t name)
{
	for (struct tfd_list *d = fabric_domains.next; d != &fabric_domains; d = d->next) {
		struct tfd_domain *domain = tfd_container(d, struct tfd_domain, link);

		for (struct tfd_list *h = domain->halves.next; h != &domain->halves; h = h->next) {
			struct tfd_half *half = tfd_container(h, struct tfd_half, link);

			if (half->name == name)
				return half;
		}
	}
	return NULL;
}

void tfd_sim_grow_locked(struct tfd_wc_queue *queue)
{
	uint32_t capacity = queue->capacity ? 2 * queue->capacity : 256;
	struct tfd_wc *items = malloc(capacity * sizeof(*items));

	if (!items)
		abort(); /* a simulation that loses a completion says nothing */
	for (uint32_t i = queue->head; i != queue->tail; i++)
		items[i & (capacity - 1)] = queue->items[i & (queue->capacity - 1)];
	free(queue->items);
	queue->items = items;
	queue->capacity = capacity;
}

static void overrun_locked(struct tfd_domain *domain)
{
	domain->done.head = domain->done.tail;
	domain->imms = 0;
	*tfd_sim_done_locked(domain) = (struct tfd_wc){ .type = TFD_WC_ERROR, .error = EOVERFLOW };
}

bool tfd_sim_takes_imm_locked(struct tfd_domain *domain)
{
	if (domain->imms < domain->options.imm_depth) {
		domain->imms++;
		return true;
	}
	fabric_overruns++;
	overrun_locked(domain);
	return false;
}

/* Something is no longer as it was: whatever is posted next flies, and is looked at. `gone`: a half, or NULL. */
static void doubt_locked(const struct tfd_half *gone)
{
	for (struct tfd_list *d = fabric_domains.next; d != &fabric_domains; d = d->next) {
		struct tfd_domain *domain = tfd_container(d, struct tfd_domain, link);

		for (struct tfd_list *h = domain->halves.next; h != &domain->halves; h = h->next) {
			struct tfd_half *half = tfd_container(h, struct tfd_half, link);

			half->at_once = NULL;
			if (half->far_half == gone)
				half->far_half = NULL;
		}
	}
}

void tfd_sim_fault_locked(struct tfd_half *half, enum tfd_sim_fault fault)
{
	half->faults |= fault;
	doubt_locked(NULL);
}

/* ---- ops ---- */

static int domain_open(const struct tfd_group_options *group, const char *name, struct tfd_rail_info *info,
                       struct tfd_domain **out, struct tfd_error *error)
{
	struct tfd_sim_options options;
	struct tfd_domain *domain;
	int rc = tfd_sim_parse(group->fabric, &options, error);

	if (rc)
		return rc;
	domain = calloc(1, sizeof(*domain));
	if (!domain)
		return tfd_fail(error, -ENOMEM, "no memory for a rail");
	domain->options = options;
	domain->state = TFD_RAIL_UP;
	domain->null = !options.move && !options.delay_us && !options.rate_gbps && !options.again &&
	               options.ordered && !options.imm_depth;
	tfd_list_init(&domain->halves);
	tfd_list_init(&domain->mrs);
	tfd_list_init(&domain->flights_free);
	domain->random = options.seed * 0x9e3779b97f4a7c15ull;
	for (const char *c = name; *c; c++)
		domain->random = (domain->random ^ (uint8_t)*c) * 0x100000001b3ull;
	tfd_sim_lock();
	tfd_list_push(&fabric_domains, &domain->link);
	tfd_sim_unlock();
	(void)snprintf(info->name, sizeof(info->name), "%s", name);
	(void)snprintf(info->provider, sizeof(info->provider), "sim");
	(void)snprintf(info->protocol, sizeof(info->protocol), "sim/%u/%u", options.ordered,
	               options.channels);
	info->max_message_bytes = options.max_message;
	info->ordered = options.ordered;
	info->max_parts = options.parts;
	info->imm_depth = options.imm_depth;
	info->channels = options.channels;
	*out = domain;
	return 0;
}

static void half_free(struct tfd_half *half)
{
	struct tfd_wc_queue *done = &half->domain->done;

	tfd_sim_lock();
	for (uint32_t i = 0; i < half->domain->options.channels; i++) {
		struct tfd_list *flights = &half->channels[i].flights;

		while (!tfd_list_empty(flights)) {
			struct tfd_flight *flight = tfd_container(flights->next, struct tfd_flight, link);

			flight->wr = NULL;
			tfd_sim_flight_end_locked(half, flight, false);
		}
	}
	doubt_locked(half);
	for (uint32_t i = done->head; i != done->tail; i++) {
		struct tfd_wc *wc = &done->items[i & (done->capacity - 1)];

		if (wc->owner == half->owner) /* whoever has not looked yet must not find it */
			wc->owner = NULL;
	}
	tfd_list_remove(&half->link);
	tfd_sim_unlock();
	free(half);
}

static void domain_close(struct tfd_domain *domain)
{
	if (!domain)
		return;
	while (!tfd_list_empty(&domain->halves))
		half_free(tfd_container(domain->halves.next, struct tfd_half, link));
	tfd_sim_lock();
	tfd_list_remove(&domain->link);
	tfd_sim_unlock();
	free(domain->done.items);
	while (!tfd_list_empty(&domain->flights_free)) {
		struct tfd_flight *flight = tfd_container(domain->flights_free.next, struct tfd_flight, link);

		tfd_list_remove(&flight->link);
		free(flight);
	}
	free(domain);
}

static uint32_t rail_state(const struct tfd_domain *domain)
{
	return tfd_load_relaxed(&domain->state);
}

static int mr_open(struct tfd_domain *domain, void *address, size_t length, uint32_t access,
                   struct tfd_mr **out, struct tfd_region_key *key, struct tfd_error *error)
{
	struct tfd_mr *mr = calloc(1, sizeof(*mr));

	if (!mr)
		return tfd_fail(error, -ENOMEM, "no memory for a registration");
	if (rail_state(domain) == TFD_RAIL_GONE) {
		free(mr);
		return tfd_fail(error, -ENODEV, "sim: the device is gone");
	}
	mr->base = address;
	mr->length = length;
	mr->writable = access & TFD_MR_WRITABLE;
	mr->readable = !(access & TFD_MR_UNREADABLE);
	tfd_sim_lock();
	mr->key = tfd_sim_random_locked(domain) << 32 | ++fabric_names;
	tfd_list_push(&domain->mrs, &mr->link);
	tfd_sim_unlock();
	key->key = mr->key;
	key->address = (uint64_t)(uintptr_t)address;
	*out = mr;
	return 0;
}

static void mr_close(struct tfd_domain *domain, struct tfd_mr *mr)
{
	(void)domain;
	tfd_sim_lock();
	tfd_list_remove(&mr->link);
	doubt_locked(NULL);
	tfd_sim_unlock();
	free(mr);
}

static int half_open(struct tfd_domain *domain, int outgoing, void *owner, struct tfd_half **out,
                     void *address, size_t *address_bytes, struct tfd_error *error)
{
	struct tfd_half *half = calloc(1, sizeof(*half));
	struct tfd_sim_address blob = { .protocol = TFD_SIM_PROTOCOL };

	(void)outgoing;
	if (!half)
		return tfd_fail(error, -ENOMEM, "no memory for a connection");
	half->domain = domain;
	half->owner = owner;
	for (uint32_t i = 0; i < domain->options.channels; i++)
		tfd_list_init(&half->channels[i].flights);
	tfd_sim_lock();
	half->name = ++fabric_names;
	tfd_list_push(&domain->halves, &half->link);
	tfd_sim_unlock();
	blob.name = half->name;
	memcpy(address, &blob, sizeof(blob));
	*address_bytes = sizeof(blob);
	*out = half;
	return 0;
}

static int half_start(struct tfd_half *half, const void *address, size_t address_bytes,
                      struct tfd_error *error)
{
	struct tfd_sim_address blob;

	if (address_bytes == sizeof(blob))
		memcpy(&blob, address, sizeof(blob));
	if (address_bytes != sizeof(blob) ||
	    memcmp(blob.protocol, TFD_SIM_PROTOCOL, sizeof(TFD_SIM_PROTOCOL)) != 0)
		return tfd_fail(error, -EPROTO, "%zu bytes are no address of a sim half", address_bytes);
	half->far = blob.name;
	return 0;
}

/* Its pieces are told failed; what had left may land all the same, from a copy. */
static void channel_close_locked(struct tfd_half *half, struct tfd_sim_channel *channel)
{
	struct tfd_list *next;

	for (struct tfd_list *link = channel->flights.next; link != &channel->flights; link = next) {
		struct tfd_flight *flight = tfd_container(link, struct tfd_flight, link);
		struct tfd_wc wc = { .type = TFD_WC_ERROR, .wr = flight->wr, .error = ECANCELED };

		next = link->next;
		if (flight->wr)
			*tfd_sim_done_locked(half->domain) = wc;
		flight->wr = NULL;
		if (!channel->mute && !tfd_sim_is_cut_locked(half) && !flight->landed)
			tfd_sim_land_locked(half, flight);
		tfd_sim_flight_end_locked(half, flight, false);
	}
}

static void half_close(struct tfd_half *half)
{
	tfd_sim_lock();
	tfd_sim_fault_locked(half, TFD_SIM_CLOSED);
	for (uint32_t i = 0; i < half->domain->options.channels; i++)
		channel_close_locked(half, &half->channels[i]);
	tfd_sim_unlock();
}

static struct tfd_flight *flight_take_locked(struct tfd_domain *domain, const struct tfd_post *post)
{
	size_t parts_bytes = (domain->options.parts - 1) * sizeof(struct tfd_post_part);
	struct tfd_flight *flight;

	if (domain->flights == FLIGHTS_MAX)
		return NULL;
	if (tfd_list_empty(&domain->flights_free)) {
		flight = malloc(sizeof(*flight) + parts_bytes);
		if (!flight)
			return NULL;
	} else {
		flight = tfd_container(domain->flights_free.next, struct tfd_flight, link);
		tfd_list_remove(&flight->link);
	}
	*flight = (struct tfd_flight){ .post = *post };
	if (post->part_count)
		memcpy(flight->parts, post->parts, post->part_count * sizeof(flight->parts[0]));
	tfd_list_init(&flight->link);
	domain->flights++;
	return flight;
}

static uint64_t bytes_of(const struct tfd_post *post)
{
	uint64_t bytes = post->length;

	for (uint32_t i = 0; i < post->part_count; i++)
		bytes += post->parts[i].length;
	return bytes;
}

/* When the rail has sent it, after everything that was posted before. */
static uint64_t sent_locked(struct tfd_domain *domain, uint64_t bytes)
{
	uint64_t now = tfd_sim_now_locked();

	if (!domain->options.rate_gbps)
		return now;
	if (domain->free_ns < now)
		domain->free_ns = now;
	domain->free_ns += 8 * bytes / domain->options.rate_gbps;
	return domain->free_ns;
}

static int post_locked(struct tfd_half *half, const struct tfd_post *post, struct tfd_wr *wr)
{
	struct tfd_sim_channel *channel = &half->channels[tfd_sim_channel_of(half, post)];
	struct tfd_domain *domain = half->domain;
	struct tfd_flight *flight;
	uint64_t due;

	if (post->part_count >= domain->options.parts || (post->part_count && post->read))
		return -EINVAL;
	if (bytes_of(post) > domain->options.max_message)
		return -EMSGSIZE;
	if ((half->faults & TFD_SIM_BROKEN) || domain->dead)
		return -ENOTCONN;
	if (domain->options.again && tfd_sim_random_locked(domain) % 100 < domain->options.again)
		return -EAGAIN;
	flight = flight_take_locked(domain, post);
	if (!flight)
		return -EAGAIN;
	flight->wr = wr;
	due = sent_locked(domain, bytes_of(post)) + tfd_sim_delay_locked(domain);
	if (domain->options.ordered && due < channel->last_due_ns)
		due = channel->last_due_ns;
	channel->last_due_ns = flight->due_ns = due;
	tfd_list_push(&channel->flights, &flight->link);
	half->at_once = NULL; /* nothing passes it */
	return 0;
}

static __attribute__((noinline)) int post_to_fly(struct tfd_half *half, const struct tfd_post *post,
                                                 struct tfd_wr *wr)
{
	int rc;

	tfd_sim_lock();
	rc = post_locked(half, post, wr);
	tfd_sim_unlock();
	return rc;
}

static bool reaches_all(const struct tfd_half *half, const struct tfd_post *post)
{
	const struct tfd_mr *mr = half->at_once;
	uint64_t bytes = post->length;

	if (!tfd_sim_reaches(mr, post->remote_address, bytes))
		return false;
	for (uint32_t i = 0; i < post->part_count; i++) {
		const struct tfd_post_part *part = &post->parts[i];

		bytes += part->length;
		if (!tfd_sim_reaches(mr, part->remote_address, part->length))
			return false;
	}
	return bytes <= half->domain->options.max_message && post->part_count < half->domain->options.parts;
}

/* On the null fabric what is like the one before lands, and is acknowledged, as it is posted. */
static bool land_at_once_locked(struct tfd_half *half, const struct tfd_post *post, struct tfd_wr *wr)
{
	const struct tfd_half *far = half->far_half;

	if (!half->at_once || half->at_once->key != post->remote_key || !reaches_all(half, post) ||
	    tfd_sim_is_full(&half->domain->done))
		return false;
	if (post->has_imm) {
		if (tfd_sim_is_full(&far->domain->done))
			return false;
		*tfd_sim_next(&far->domain->done) = (struct tfd_wc){ .type = TFD_WC_IMM,
		                                                     .imm = post->imm,
		                                                     .order = tfd_sim_channel_of(half, post),
		                                                     .owner = far->owner };
	}
	*tfd_sim_next(&half->domain->done) = (struct tfd_wc){ .type = TFD_WC_SENT, .wr = wr };
	return true;
}

static int post(struct tfd_half *half, const struct tfd_post *post, struct tfd_wr *wr)
{
	bool landed;

	if (!tfd_sim_try_lock())
		return post_to_fly(half, post, wr);
	landed = land_at_once_locked(half, post, wr);
	tfd_sim_unlock();
	return landed ? 0 : post_to_fly(half, post, wr);
}

static int poll(struct tfd_domain *domain, struct tfd_wc *wc, int max)
{
	struct tfd_wc_queue *done = &domain->done;
	int count = 0;

	tfd_sim_lock();
	for (struct tfd_list *link = domain->halves.next; link != &domain->halves; link = link->next) {
		struct tfd_half *half = tfd_container(link, struct tfd_half, link);

		tfd_sim_step_locked(half);
	}
	while (count < max && done->head != done->tail) {
		uint32_t at = done->head & (done->capacity - 1);
		int run = (int)(done->tail - done->head);

		if (run > (int)(done->capacity - at)) /* up to where the ring begins anew */
			run = (int)(done->capacity - at);
		if (run > max - count)
			run = max - count;
		memcpy(&wc[count], &done->items[at], (size_t)run * sizeof(*wc));
		done->head += (uint32_t)run;
		count += run;
	}
	for (int i = 0; domain->options.imm_depth && i < count; i++)
		domain->imms -= wc[i].type == TFD_WC_IMM;
	tfd_sim_unlock();
	return count;
}

static int half_drain(struct tfd_half *half, struct tfd_wc *wc, int max)
{
	return poll(half->domain, wc, max);
}

static int wait_fd(struct tfd_domain *domain)
{
	(void)domain;
	return -1;
}

static int arm(struct tfd_domain *domain)
{
	bool busy;

	tfd_sim_lock();
	busy = domain->done.head != domain->done.tail;
	tfd_sim_unlock();
	return busy ? -EAGAIN : 0;
}

/* ---- faults ---- */

void tfd_sim_set_now(uint64_t now_ns)
{
	tfd_sim_lock();
	fabric_now_ns = now_ns;
	tfd_sim_unlock();
}

void tfd_sim_overrun(struct tfd_domain *domain)
{
	tfd_sim_lock();
	overrun_locked(domain);
	tfd_sim_unlock();
}

uint64_t tfd_sim_overruns(void)
{
	uint64_t overruns;

	tfd_sim_lock();
	overruns = fabric_overruns;
	tfd_sim_unlock();
	return overruns;
}

const struct tfd_provider_ops tfd_sim_ops = {
	.name = "sim",
	.path_id = TFD_PATH_SIM,
	.domain_open = domain_open,
	.domain_close = domain_close,
	.mr_open = mr_open,
	.mr_close = mr_close,
	.half_open = half_open,
	.half_start = half_start,
	.half_close = half_close,
	.half_drain = half_drain,
	.half_free = half_free,
	.post = post,
	.poll = poll,
	.rail_state = rail_state,
	.wait_fd = wait_fd,
	.arm = arm,
};
