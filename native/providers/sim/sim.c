/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The simulated fabric. A posted piece is a flight: it lands when its time has come, at a poll of the sender's domain, and is
 * acknowledged later still. One lock for the whole fabric: domains are polled by their workers' threads, or all by a test.
 */
#include "fabric.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FLIGHTS_MAX 4096u

static pthread_mutex_t fabric_lock = PTHREAD_MUTEX_INITIALIZER;
static struct tfd_list fabric_domains = { &fabric_domains, &fabric_domains };
static uint64_t fabric_names;
static uint64_t fabric_now_ns; /* 0: real time */

static void lock(void)
{
	(void)pthread_mutex_lock(&fabric_lock);
}

static void unlock(void)
{
	(void)pthread_mutex_unlock(&fabric_lock);
}

static uint64_t now_locked(void)
{
	return fabric_now_ns ? fabric_now_ns : tfd_now_ns();
}

uint64_t tfd_sim_random_locked(struct tfd_domain *domain)
{
	domain->random = domain->random * 6364136223846793005ull + 1442695040888963407ull;
	return domain->random >> 33;
}

static uint64_t delay_locked(struct tfd_domain *domain)
{
	return domain->options.delay_us ?
	               tfd_sim_random_locked(domain) % (1000ull * domain->options.delay_us + 1) :
	               0;
}

static struct tfd_half *half_find_locked(uint64_t name)
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

/* The far half, or NULL once it was freed. */
struct tfd_half *tfd_sim_far_locked(struct tfd_half *half)
{
	if (!half->far_half)
		half->far_half = half_find_locked(half->far);
	return half->far_half;
}

void tfd_sim_complete_locked(struct tfd_domain *domain, const struct tfd_wc *wc)
{
	struct tfd_done *done = domain->done_free;

	if (done)
		domain->done_free = done->next;
	else
		done = malloc(sizeof(*done));
	if (!done)
		abort(); /* a simulation that loses a completion says nothing */
	*done = (struct tfd_done){ .wc = *wc };
	*domain->last = done;
	domain->last = &done->next;
}

static void done_drop_locked(struct tfd_domain *domain, struct tfd_done *done)
{
	domain->first = done->next;
	if (!domain->first)
		domain->last = &domain->first;
	done->next = domain->done_free;
	domain->done_free = done;
}

static void dones_drop_locked(struct tfd_domain *domain)
{
	while (domain->first)
		done_drop_locked(domain, domain->first);
}

static void flight_end_locked(struct tfd_half *half, struct tfd_flight *flight, bool error)
{
	struct tfd_wc wc = { .type = error ? TFD_WC_ERROR : TFD_WC_SENT,
	                     .wr = flight->wr,
	                     .error = error ? EIO : 0,
	                     .remote_access = flight->refused };

	if (flight->wr)
		tfd_sim_complete_locked(half->domain, &wc);
	tfd_list_remove(&flight->link);
	half->domain->flights--;
	tfd_list_push(&half->domain->flights_free, &flight->link);
}

/* Ordered: nothing passes what was posted before it. */
static void half_step_locked(struct tfd_half *half)
{
	bool ordered = half->domain->options.ordered != 0;
	uint64_t now = now_locked();
	struct tfd_list *next;

	if (half->mute && !half->broken)
		return;

	for (struct tfd_list *link = half->flights.next; link != &half->flights; link = next) {
		struct tfd_flight *flight = tfd_container(link, struct tfd_flight, link);

		next = link->next;
		if (flight->due_ns > now && !half->broken) {
			if (ordered)
				return;
			continue;
		}
		if (half->broken) {
			if (!flight->landed)
				tfd_sim_land_some_locked(half, flight);
			flight_end_locked(half, flight, true);
			continue;
		}
		if (flight->landed) {
			flight_end_locked(half, flight, false);
			continue;
		}
		if (half->fails_next && !half->domain->dead) {
			half->fails_next = false;
			if (tfd_sim_random_locked(half->domain) % 2)
				tfd_sim_land_locked(half, flight);
			flight_end_locked(half, flight, true);
			continue;
		}
		tfd_sim_land_locked(half, flight);
		if (flight->refused || half->broken) {
			half->broken = true;
			flight_end_locked(half, flight, true);
			continue;
		}
		if (!flight->wr) {
			flight_end_locked(half, flight, false);
			continue;
		}
		flight->due_ns = now + delay_locked(half->domain);
		if (flight->due_ns > now && ordered)
			return;
		next = link; /* acknowledged at once */
	}
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
	domain->last = &domain->first;
	tfd_list_init(&domain->halves);
	tfd_list_init(&domain->mrs);
	tfd_list_init(&domain->flights_free);
	domain->random = options.seed * 0x9e3779b97f4a7c15ull;
	for (const char *c = name; *c; c++)
		domain->random = (domain->random ^ (uint8_t)*c) * 0x100000001b3ull;
	lock();
	tfd_list_push(&fabric_domains, &domain->link);
	unlock();
	(void)snprintf(info->name, sizeof(info->name), "%s", name);
	(void)snprintf(info->provider, sizeof(info->provider), "sim");
	(void)snprintf(info->protocol, sizeof(info->protocol), "sim/%u", options.ordered);
	info->max_message_bytes = options.max_message;
	info->ordered = options.ordered;
	info->max_parts = options.parts;
	*out = domain;
	return 0;
}

static void halves_forget_locked(struct tfd_domain *domain, const struct tfd_half *gone)
{
	for (struct tfd_list *link = domain->halves.next; link != &domain->halves; link = link->next) {
		struct tfd_half *half = tfd_container(link, struct tfd_half, link);

		if (half->far_half == gone)
			half->far_half = NULL;
	}
}

static void half_free(struct tfd_half *half)
{
	lock();
	while (!tfd_list_empty(&half->flights)) {
		struct tfd_flight *flight = tfd_container(half->flights.next, struct tfd_flight, link);

		flight->wr = NULL;
		flight_end_locked(half, flight, false);
	}
	for (struct tfd_list *link = fabric_domains.next; link != &fabric_domains; link = link->next)
		halves_forget_locked(tfd_container(link, struct tfd_domain, link), half);
	for (struct tfd_done *done = half->domain->first; done; done = done->next) {
		if (done->wc.owner == half->owner) /* whoever has not looked yet must not find it */
			done->wc.owner = NULL;
	}
	tfd_list_remove(&half->link);
	unlock();
	free(half);
}

static void domain_close(struct tfd_domain *domain)
{
	if (!domain)
		return;
	while (!tfd_list_empty(&domain->halves))
		half_free(tfd_container(domain->halves.next, struct tfd_half, link));
	lock();
	tfd_list_remove(&domain->link);
	unlock();
	dones_drop_locked(domain);
	while (domain->done_free) {
		struct tfd_done *done = domain->done_free;

		domain->done_free = done->next;
		free(done);
	}
	while (!tfd_list_empty(&domain->flights_free)) {
		struct tfd_flight *flight = tfd_container(domain->flights_free.next, struct tfd_flight, link);

		tfd_list_remove(&flight->link);
		free(flight);
	}
	free(domain);
}

static int mr_open(struct tfd_domain *domain, void *address, size_t length, int writable, struct tfd_mr **out,
                   struct tfd_region_key *key, struct tfd_error *error)
{
	struct tfd_mr *mr = calloc(1, sizeof(*mr));

	if (!mr)
		return tfd_fail(error, -ENOMEM, "no memory for a registration");
	mr->base = address;
	mr->length = length;
	mr->writable = writable != 0;
	lock();
	mr->key = tfd_sim_random_locked(domain) << 32 | ++fabric_names;
	tfd_list_push(&domain->mrs, &mr->link);
	unlock();
	key->key = mr->key;
	key->address = (uint64_t)(uintptr_t)address;
	*out = mr;
	return 0;
}

static void mr_close(struct tfd_domain *domain, struct tfd_mr *mr)
{
	(void)domain;
	lock();
	tfd_list_remove(&mr->link);
	unlock();
	free(mr);
}

static int half_open(struct tfd_domain *domain, int outgoing, void *owner, struct tfd_half **out,
                     void *address, size_t *address_bytes, struct tfd_error *error)
{
	struct tfd_half *half = calloc(1, sizeof(*half));

	(void)outgoing;
	if (!half)
		return tfd_fail(error, -ENOMEM, "no memory for a connection");
	half->domain = domain;
	half->owner = owner;
	tfd_list_init(&half->flights);
	lock();
	half->name = ++fabric_names;
	tfd_list_push(&domain->halves, &half->link);
	unlock();
	memcpy(address, &half->name, sizeof(half->name));
	*address_bytes = sizeof(half->name);
	*out = half;
	return 0;
}

static int half_start(struct tfd_half *half, const void *address, size_t address_bytes,
                      struct tfd_error *error)
{
	if (address_bytes != sizeof(half->far))
		return tfd_fail(error, -EPROTO, "a sim address of %zu bytes is malformed", address_bytes);
	memcpy(&half->far, address, sizeof(half->far));
	return 0;
}

/* Its pieces are told failed; what had left may land all the same, from a copy. */
static void half_close(struct tfd_half *half)
{
	struct tfd_list *next;

	lock();
	half->closed = true;
	for (struct tfd_list *link = half->flights.next; link != &half->flights; link = next) {
		struct tfd_flight *flight = tfd_container(link, struct tfd_flight, link);
		struct tfd_wc wc = { .type = TFD_WC_ERROR, .wr = flight->wr, .error = ECANCELED };

		next = link->next;
		if (flight->wr)
			tfd_sim_complete_locked(half->domain, &wc);
		flight->wr = NULL;
		if (!half->mute && !flight->landed)
			tfd_sim_land_locked(half, flight);
		flight_end_locked(half, flight, false);
	}
	unlock();
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

static int post_locked(struct tfd_half *half, const struct tfd_post *post, struct tfd_wr *wr)
{
	struct tfd_domain *domain = half->domain;
	struct tfd_flight *flight;
	uint64_t due;

	if (half->broken || domain->dead)
		return -ENOTCONN;
	if (domain->options.again && tfd_sim_random_locked(domain) % 100 < domain->options.again)
		return -EAGAIN;
	flight = flight_take_locked(domain, post);
	if (!flight)
		return -EAGAIN;
	flight->wr = wr;
	due = now_locked() + delay_locked(domain);
	if (domain->options.ordered && due < half->last_due_ns)
		due = half->last_due_ns;
	half->last_due_ns = flight->due_ns = due;
	tfd_list_push(&half->flights, &flight->link);
	return 0;
}

static int post(struct tfd_half *half, const struct tfd_post *post, struct tfd_wr *wr)
{
	int rc;

	if (post->part_count >= half->domain->options.parts || (post->part_count && post->read))
		return -EINVAL;
	if (bytes_of(post) > half->domain->options.max_message)
		return -EMSGSIZE;
	lock();
	rc = post_locked(half, post, wr);
	unlock();
	return rc;
}

static int poll(struct tfd_domain *domain, struct tfd_wc *wc, int max)
{
	int count = 0;

	lock();
	for (struct tfd_list *link = domain->halves.next; link != &domain->halves; link = link->next) {
		struct tfd_half *half = tfd_container(link, struct tfd_half, link);

		if (!tfd_list_empty(&half->flights))
			half_step_locked(half);
	}
	while (count < max && domain->first) {
		struct tfd_done *done = domain->first;

		wc[count++] = done->wc;
		done_drop_locked(domain, done);
	}
	unlock();
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

	lock();
	busy = domain->first != NULL;
	unlock();
	return busy ? -EAGAIN : 0;
}

/* ---- faults ---- */

void tfd_sim_set_now(uint64_t now_ns)
{
	lock();
	fabric_now_ns = now_ns;
	unlock();
}

void tfd_sim_break(struct tfd_half *half)
{
	lock();
	half->broken = true;
	unlock();
}

void tfd_sim_mute(struct tfd_half *half)
{
	lock();
	half->mute = true;
	unlock();
}

void tfd_sim_fail(struct tfd_half *half)
{
	lock();
	half->fails_next = true;
	unlock();
}

void tfd_sim_overrun(struct tfd_domain *domain)
{
	lock();
	dones_drop_locked(domain);
	tfd_sim_complete_locked(domain, &(struct tfd_wc){ .type = TFD_WC_ERROR, .error = EOVERFLOW });
	unlock();
}

void tfd_sim_kill(struct tfd_domain *domain)
{
	lock();
	domain->dead = true;
	for (struct tfd_list *link = domain->halves.next; link != &domain->halves; link = link->next)
		tfd_container(link, struct tfd_half, link)->broken = true;
	unlock();
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
	.wait_fd = wait_fd,
	.arm = arm,
};
