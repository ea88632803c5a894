/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The simulated fabric. A posted piece is a flight: it lands when its time has come, at a poll of the sender's domain, and is
 * acknowledged later still. One lock for the whole fabric: domains are polled by their workers' threads, or all by a test.
 */
#include "sim.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../core/parts.h"

#define FLIGHTS_MAX 4096u

struct flight {
	struct tfd_list link; /* in its half's flights, in the order of posting */
	struct tfd_post post;
	struct tfd_wr *wr; /* NULL: its sender has closed and is told; the bytes are our own copy */
	uint64_t due_ns;
	bool landed;
	bool refused;
	uint8_t *copy;
};

struct done {
	struct done *next;
	struct tfd_wc wc;
};

struct tfd_mr {
	struct tfd_list link;
	uint64_t key;
	uint8_t *base;
	uint64_t length;
	bool writable;
};

struct tfd_domain {
	struct tfd_sim_options options;
	struct tfd_list link;
	struct tfd_list halves;
	struct tfd_list mrs;
	struct done *first;
	struct done **last;
	uint64_t random;
	uint32_t flights;
	bool dead;
};

struct tfd_half {
	struct tfd_list link; /* domain's */
	struct tfd_domain *domain;
	void *owner;
	uint64_t name;
	uint64_t far; /* 0: not started */
	struct tfd_list flights;
	uint64_t last_due_ns;
	bool broken;
	bool closed;
	bool mute;
	bool fails_next;
};

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

static uint64_t random_locked(struct tfd_domain *domain)
{
	domain->random = domain->random * 6364136223846793005ull + 1442695040888963407ull;
	return domain->random >> 33;
}

static uint64_t delay_locked(struct tfd_domain *domain)
{
	return domain->options.delay_us ? random_locked(domain) % (1000ull * domain->options.delay_us + 1) :
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

static void complete_locked(struct tfd_domain *domain, const struct tfd_wc *wc)
{
	struct done *done = malloc(sizeof(*done));

	if (!done)
		abort(); /* a simulation that loses a completion says nothing */
	*done = (struct done){ .wc = *wc };
	*domain->last = done;
	domain->last = &done->next;
}

static void done_free(struct tfd_domain *domain)
{
	while (domain->first) {
		struct done *done = domain->first;

		domain->first = done->next;
		free(done);
	}
	domain->last = &domain->first;
}

/* ---- landing ---- */

static bool reaches(const struct tfd_mr *mr, const struct tfd_post *post)
{
	uint64_t base = (uint64_t)(uintptr_t)mr->base;

	return post->remote_address >= base && post->remote_address - base <= mr->length &&
	       post->length <= mr->length - (post->remote_address - base) && (post->read || mr->writable);
}

static bool move_locked(struct tfd_half *far, const struct flight *flight)
{
	const struct tfd_post *post = &flight->post;
	void *remote = (void *)(uintptr_t)post->remote_address;

	if (!post->length)
		return true;
	for (struct tfd_list *link = far->domain->mrs.next; link != &far->domain->mrs; link = link->next) {
		const struct tfd_mr *mr = tfd_container(link, struct tfd_mr, link);

		if (mr->key != post->remote_key)
			continue;
		if (!reaches(mr, post))
			return false;
		if (!far->domain->options.move)
			return true;
		if (post->read)
			memcpy((void *)(uintptr_t)post->local, remote, post->length);
		else
			memcpy(remote, flight->copy ? flight->copy : post->local, post->length);
		return true;
	}
	return false;
}

static bool usable(const struct tfd_half *half)
{
	return half && !half->closed && !half->broken && !half->domain->dead;
}

static void land_locked(struct tfd_half *half, struct flight *flight)
{
	struct tfd_half *far = half_find_locked(half->far);

	/* What had left before its sender closed still arrives; what breaks takes both ends with it. */
	if (!usable(far) || half->broken || half->domain->dead) {
		half->broken = true;
		return;
	}
	if (!move_locked(far, flight)) {
		flight->refused = true;
		return;
	}
	flight->landed = true;
	if (flight->post.has_imm)
		complete_locked(
			far->domain,
			&(struct tfd_wc){ .type = TFD_WC_IMM,
			                  .imm = flight->post.imm,
			                  .owner = half->domain->options.ordered ? far->owner : NULL });
}

static void flight_end_locked(struct tfd_half *half, struct flight *flight, bool error)
{
	struct tfd_wc wc = { .type = error ? TFD_WC_ERROR : TFD_WC_SENT,
	                     .wr = flight->wr,
	                     .error = error ? EIO : 0,
	                     .remote_access = flight->refused };

	if (flight->wr)
		complete_locked(half->domain, &wc);
	tfd_list_remove(&flight->link);
	half->domain->flights--;
	free(flight->copy);
	free(flight);
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
		struct flight *flight = tfd_container(link, struct flight, link);

		next = link->next;
		if (flight->due_ns > now && !half->broken) {
			if (ordered)
				return;
			continue;
		}
		if (half->broken) {
			flight_end_locked(half, flight, true);
			continue;
		}
		if (flight->landed) {
			flight_end_locked(half, flight, false);
			continue;
		}
		if (half->fails_next && !half->domain->dead) {
			half->fails_next = false;
			if (random_locked(half->domain) % 2)
				land_locked(half, flight);
			flight_end_locked(half, flight, true);
			continue;
		}
		land_locked(half, flight);
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
	*out = domain;
	return 0;
}

static void half_free(struct tfd_half *half)
{
	lock();
	while (!tfd_list_empty(&half->flights)) {
		struct flight *flight = tfd_container(half->flights.next, struct flight, link);

		flight->wr = NULL;
		flight_end_locked(half, flight, false);
	}
	for (struct done *done = half->domain->first; done; done = done->next) {
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
	done_free(domain);
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
	mr->key = random_locked(domain) << 32 | ++fabric_names;
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
		struct flight *flight = tfd_container(link, struct flight, link);
		struct tfd_wc wc = { .type = TFD_WC_ERROR, .wr = flight->wr, .error = ECANCELED };

		next = link->next;
		if (flight->wr)
			complete_locked(half->domain, &wc);
		flight->wr = NULL;
		if (!half->mute && !flight->landed)
			land_locked(half, flight);
		flight_end_locked(half, flight, false);
	}
	unlock();
}

static int post(struct tfd_half *half, const struct tfd_post *post, struct tfd_wr *wr)
{
	struct tfd_domain *domain = half->domain;
	struct flight *flight;
	uint64_t due;

	if (post->length > domain->options.max_message)
		return -EMSGSIZE;
	if (domain->flights == FLIGHTS_MAX)
		return -EAGAIN;
	flight = calloc(1, sizeof(*flight));
	if (!flight)
		return -EAGAIN;
	flight->post = *post;
	flight->wr = wr;
	lock();
	if (half->broken || domain->dead) {
		unlock();
		free(flight);
		return -ENOTCONN;
	}
	if (domain->options.again && random_locked(domain) % 100 < domain->options.again) {
		unlock();
		free(flight);
		return -EAGAIN;
	}
	due = now_locked() + delay_locked(domain);
	if (domain->options.ordered && due < half->last_due_ns)
		due = half->last_due_ns;
	half->last_due_ns = flight->due_ns = due;
	tfd_list_push(&half->flights, &flight->link);
	domain->flights++;
	unlock();
	return 0;
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
		struct done *done = domain->first;

		wc[count++] = done->wc;
		domain->first = done->next;
		if (!domain->first)
			domain->last = &domain->first;
		free(done);
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
	done_free(domain);
	complete_locked(domain, &(struct tfd_wc){ .type = TFD_WC_ERROR, .error = EOVERFLOW });
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
