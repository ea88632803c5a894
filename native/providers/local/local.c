/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The local provider: both ends are sessions of one domain group, so the one worker copies, and tells itself. A post is done when it
 * returns; what there is to tell waits in a queue of fixed size for the poll of the same pass.
 */
#include "local.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

#include "../../core/parts.h"

#define QUEUE_ENTRIES 1024u         /* power of two */
#define MESSAGE_BYTES (256u << 10)  /* copied at once */
#define PASS_BYTES                                                                                          \
	(4 *                                                                                                \
	 MESSAGE_BYTES) /* copied between two polls, of all halves: rings and other rails wait meanwhile */
#define PARTS_MAX 64u               /* ranges of one post */
#define PAGE_BYTES 4096u            /* the smallest that can vanish */
#define ID_BYTES 16u

/* A rail. Owner: worker, but for its memory. */
struct tfd_domain {
	char protocol[TFD_NAME_MAX]; /* constant */
	int idle_fd;                 /* constant; never readable */
	struct tfd_local_memory memory;
	struct tfd_list halves;
	uint64_t last_name;
	uint64_t pass_bytes; /* since the last poll */
	uint32_t head;
	uint32_t tail;
	struct tfd_wc queue[QUEUE_ENTRIES];
};

/* Owner: worker. */
struct tfd_half {
	struct tfd_list link; /* domain->halves */
	struct tfd_domain *domain;
	void *owner;
	uint64_t name;
	bool outgoing;
	bool broken; /* nothing may land after a piece that did not */
	struct tfd_half *far; /* NULL: not started, or closed */
};

struct local_address {
	char protocol
		[TFD_NAME_MAX]; /* with the domain's random name: no other daemon, group or life has it */
	uint64_t name;
};

struct tfd_local_memory *tfd_local_memory_of(struct tfd_domain *domain)
{
	return &domain->memory;
}

/* ---- rails ---- */

static int protocol_make(char *protocol, struct tfd_error *error)
{
	uint8_t id[ID_BYTES];
	int at = snprintf(protocol, TFD_NAME_MAX, "local/");

	if (getrandom(id, sizeof(id), 0) != (ssize_t)sizeof(id))
		return tfd_fail(error, -EIO, "getrandom gave no name for the local rail");
	for (size_t i = 0; i < sizeof(id); i++)
		at += snprintf(protocol + at, TFD_NAME_MAX - (size_t)at, "%02x", id[i]);
	return 0;
}

static void domain_close(struct tfd_domain *domain)
{
	if (!domain)
		return;
	while (!tfd_list_empty(&domain->halves)) {
		struct tfd_half *half = tfd_container(domain->halves.next, struct tfd_half, link);

		tfd_list_remove(&half->link);
		free(half);
	}
	if (domain->idle_fd >= 0)
		(void)close(domain->idle_fd);
	tfd_local_memory_fini(&domain->memory);
	free(domain);
}

static int domain_open(const struct tfd_group_options *options, const char *name, struct tfd_rail_info *info,
                       struct tfd_domain **out, struct tfd_error *error)
{
	struct tfd_domain *domain = calloc(1, sizeof(*domain));
	int rc;

	(void)options;
	if (!domain)
		return tfd_fail(error, -ENOMEM, "no memory for the local rail");
	tfd_local_memory_init(&domain->memory);
	tfd_list_init(&domain->halves);
	domain->idle_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	rc = domain->idle_fd >= 0 ?
	             protocol_make(domain->protocol, error) :
	             tfd_fail(error, -errno, "no file descriptor is left: %s", strerror(errno));
	if (rc) {
		domain_close(domain);
		return rc;
	}
	(void)snprintf(info->name, sizeof(info->name), "%s", name);
	(void)snprintf(info->provider, sizeof(info->provider), "local");
	memcpy(info->protocol, domain->protocol, sizeof(info->protocol));
	info->max_message_bytes = MESSAGE_BYTES;
	info->ordered = 1;
	info->max_parts = PARTS_MAX;
	*out = domain;
	return 0;
}

/* ---- halves ---- */

static int half_open(struct tfd_domain *domain, int outgoing, void *owner, struct tfd_half **out,
                     void *address, size_t *address_bytes, struct tfd_error *error)
{
	struct tfd_half *half = calloc(1, sizeof(*half));
	struct local_address blob = { 0 };

	if (!half)
		return tfd_fail(error, -ENOMEM, "no memory for a connection");
	half->domain = domain;
	half->owner = owner;
	half->name = ++domain->last_name;
	half->outgoing = outgoing != 0;
	tfd_list_push(&domain->halves, &half->link);
	memcpy(blob.protocol, domain->protocol, sizeof(blob.protocol));
	blob.name = half->name;
	memcpy(address, &blob, sizeof(blob));
	*address_bytes = sizeof(blob);
	*out = half;
	return 0;
}

static struct tfd_half *half_find(struct tfd_domain *domain, uint64_t name)
{
	for (struct tfd_list *link = domain->halves.next; link != &domain->halves; link = link->next) {
		struct tfd_half *half = tfd_container(link, struct tfd_half, link);

		if (half->name == name)
			return half;
	}
	return NULL;
}

static int half_start(struct tfd_half *half, const void *address, size_t address_bytes,
                      struct tfd_error *error)
{
	struct local_address blob;
	struct tfd_half *far;

	if (address_bytes != sizeof(blob))
		return tfd_fail(error, -EPROTO, "a local address of %zu bytes is malformed", address_bytes);
	memcpy(&blob, address, sizeof(blob));
	if (memcmp(blob.protocol, half->domain->protocol, sizeof(blob.protocol)) != 0)
		return tfd_fail(error, -EPROTO,
		                "the far half is of another daemon or domain group: use a rail between them");
	far = half_find(half->domain, blob.name);
	if (!far)
		return tfd_fail(error, -ENOTCONN, "local half %llu is closed", (unsigned long long)blob.name);
	if (far->outgoing == half->outgoing)
		return tfd_fail(error, -EPROTO, "both halves are %s",
		                half->outgoing ? "outgoing" : "incoming");
	half->far = far;
	return 0;
}

/* A fence as it is: nobody but this thread copies, and nothing is under way. */
static void half_close(struct tfd_half *half)
{
	struct tfd_list *halves = &half->domain->halves;

	for (struct tfd_list *link = halves->next; link != halves; link = link->next) {
		struct tfd_half *other = tfd_container(link, struct tfd_half, link);

		if (other->far == half)
			other->far = NULL;
	}
	half->far = NULL;
	tfd_list_remove(&half->link);
}

static void half_free(struct tfd_half *half)
{
	free(half);
}

/* ---- posting and polling ---- */

static uint32_t queue_count(const struct tfd_domain *domain)
{
	return domain->tail - domain->head;
}

static void tell(struct tfd_domain *domain, const struct tfd_wc *wc)
{
	domain->queue[domain->tail++ % QUEUE_ENTRIES] = *wc;
}

static bool reaches(const struct tfd_mr *mr, const struct tfd_post_part *part)
{
	return part->remote_address <= mr->length && part->length <= mr->length - part->remote_address;
}

/*
 * Whether pages of what is to be read have been taken away (the guard has mended that by then): nobody must take the zeros for
 * data. Of what is written the core finds it out by itself, by the source's region.
 */
static bool has_vanished(const uint8_t *from, uint64_t length)
{
	uint32_t before = tfd_guard_hits();

	for (uint64_t i = 0; i < length; i += PAGE_BYTES)
		(void)*(const volatile uint8_t *)(from + i);
	(void)*(const volatile uint8_t *)(from + length - 1);
	return tfd_guard_hits() != before;
}

/* Moves the bytes; whether the far side lets us. */
static bool move(const struct tfd_mr *mr, const struct tfd_post_part *part, bool read)
{
	uint8_t *remote = mr->base + part->remote_address;

	if (!reaches(mr, part))
		return false;
	/* memmove: both ranges may be one client's, and overlap. */
	if (!read)
		memmove(remote, part->local, part->length);
	else if (has_vanished(remote, part->length))
		return false;
	else
		memmove((void *)(uintptr_t)part->local, remote, part->length);
	return true;
}

static bool move_all(struct tfd_domain *domain, const struct tfd_post *post)
{
	const struct tfd_post_part first = { post->local, post->remote_address, post->length };
	const struct tfd_mr *mr;

	if (!post->length)
		return true;
	mr = tfd_local_mr_find_hot(&domain->memory, post->remote_key);
	if (!mr || !(post->read || mr->writable) || !move(mr, &first, post->read != 0))
		return false;
	for (uint32_t i = 0; i < post->part_count; i++) {
		if (!move(mr, &post->parts[i], post->read != 0))
			return false;
	}
	return true;
}

static uint64_t bytes_of(const struct tfd_post *post)
{
	uint64_t bytes = post->length;

	for (uint32_t i = 0; i < post->part_count; i++)
		bytes += post->parts[i].length;
	return bytes;
}

static int post(struct tfd_half *half, const struct tfd_post *post, struct tfd_wr *wr)
{
	struct tfd_domain *domain = half->domain;
	uint64_t bytes = bytes_of(post);

	if (!half->far || half->broken)
		return -ENOTCONN;
	if (bytes > MESSAGE_BYTES)
		return -EMSGSIZE;
	if (post->read && post->length && !post->mr->writable)
		return -EACCES;
	/* One post tells two things at most. */
	if (queue_count(domain) > QUEUE_ENTRIES - 2 || domain->pass_bytes >= PASS_BYTES)
		return -EAGAIN;
	domain->pass_bytes += bytes;
	if (!move_all(domain, post)) {
		half->broken = true;
		tell(domain,
		     &(struct tfd_wc){ .type = TFD_WC_ERROR, .wr = wr, .error = EACCES, .remote_access = 1 });
		return 0;
	}
	if (post->has_imm)
		tell(domain,
		     &(struct tfd_wc){ .type = TFD_WC_IMM, .imm = post->imm, .owner = half->far->owner });
	tell(domain, &(struct tfd_wc){ .type = TFD_WC_SENT, .wr = wr });
	return 0;
}

static int poll(struct tfd_domain *domain, struct tfd_wc *wc, int max)
{
	int count = 0;

	domain->pass_bytes = 0;
	while (count < max && domain->head != domain->tail)
		wc[count++] = domain->queue[domain->head++ % QUEUE_ENTRIES];
	return count;
}

static int half_drain(struct tfd_half *half, struct tfd_wc *wc, int max)
{
	return poll(half->domain, wc, max);
}

static int wait_fd(struct tfd_domain *domain)
{
	return domain->idle_fd;
}

/* Only the worker's own posts make work here, so nothing can come while it sleeps. */
static int arm(struct tfd_domain *domain)
{
	return queue_count(domain) ? -EAGAIN : 0;
}

const struct tfd_provider_ops tfd_local_ops = {
	.name = "local",
	.path_id = TFD_PATH_LOCAL,
	.domain_open = domain_open,
	.domain_close = domain_close,
	.mr_open = tfd_local_mr_open,
	.mr_close = tfd_local_mr_close,
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
