/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The local provider: both ends are sessions of one domain group, so the one worker copies, and tells itself. What is short is copied
 * when its post returns, what is long by helpers, if there are any. Posts are told of in their order, from a queue of fixed size.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

#include "../../core/barrier.h"
#include "../../core/parts.h"
#include "../memory.h"
#include "helpers.h"

#define QUEUE_ENTRIES 1024u         /* power of two */
#define MESSAGE_BYTES (256u << 10)  /* copied at once */
#define PASS_BYTES                                                                                          \
	(4 *                                                                                                \
	 MESSAGE_BYTES) /* copied between two polls, of all halves: rings and other rails wait meanwhile */
#define HELP_BYTES (128u << 10)     /* below, handing over takes as long as copying */
#define STREAM_BYTES (32ull << 20)  /* a job that the caches of a processor would not keep */
#define ID_BYTES 16u

/* A post that is to be told of: its immediate, then itself. Owner: worker, but for its state. */
struct op {
	struct tfd_wr *wr;
	struct tfd_half *half;
	void *far_owner;
	uint32_t state; /* shared; enum tfd_local_state; of what a helper copies it is the helper's */
	uint32_t imm;
	bool has_imm; /* not told yet */
	bool refused;
};

/* A rail. Owner: worker, but for its memory. */
struct tfd_domain {
	char protocol[TFD_NAME_MAX]; /* constant */
	int wake_fd; /* constant; eventfd; readable when a helper has done something while we sleep */
	struct tfd_memory memory;
	struct tfd_local_helpers helpers;
	struct tfd_list halves;
	uint64_t last_name;
	uint64_t pass_bytes; /* since the last poll */
	uint32_t head;
	uint32_t tail;
	struct tfd_local_copy copy; /* what the worker copies itself */
	struct op queue[QUEUE_ENTRIES];
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
	tfd_local_helpers_close(&domain->helpers);
	if (domain->wake_fd >= 0)
		(void)close(domain->wake_fd);
	tfd_memory_fini(&domain->memory);
	free(domain);
}

static int domain_open(const struct tfd_group_options *options, const char *name, struct tfd_rail_info *info,
                       struct tfd_domain **out, struct tfd_error *error)
{
	struct tfd_domain *domain = calloc(1, sizeof(*domain));
	int rc;

	if (!domain)
		return tfd_fail(error, -ENOMEM, "no memory for the local rail");
	tfd_memory_init(&domain->memory);
	tfd_list_init(&domain->halves);
	tfd_local_copy_init();
	domain->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	rc = domain->wake_fd >= 0 ?
	             protocol_make(domain->protocol, error) :
	             tfd_fail(error, -errno, "no file descriptor is left: %s", strerror(errno));
	if (!rc)
		rc = tfd_local_helpers_open(&domain->helpers, options->copy_threads, domain->wake_fd, error);
	if (rc) {
		domain_close(domain);
		return rc;
	}
	(void)snprintf(info->name, sizeof(info->name), "%s", name);
	(void)snprintf(info->provider, sizeof(info->provider), "local");
	memcpy(info->protocol, domain->protocol, sizeof(info->protocol));
	info->max_message_bytes = MESSAGE_BYTES;
	info->ordered = 1;
	info->max_parts = TFD_LOCAL_PARTS;
	*out = domain;
	return 0;
}

static int mr_open(struct tfd_domain *domain, void *address, size_t length, uint32_t access,
                   struct tfd_mr **out, struct tfd_region_key *key, struct tfd_error *error)
{
	const struct tfd_memory_range range = { address, length, access, 0, 0 };
	int rc = tfd_memory_add(&domain->memory, &range, out, error);

	if (!rc)
		*key = (struct tfd_region_key){ .key = (*out)->key };
	return rc;
}

static void mr_close(struct tfd_domain *domain, struct tfd_mr *mr)
{
	tfd_memory_remove(&domain->memory, mr);
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

/* A fence: nobody but this thread and its helpers copies, and then nothing is under way. */
static void half_close(struct tfd_half *half)
{
	struct tfd_list *halves = &half->domain->halves;

	tfd_local_helpers_drain(&half->domain->helpers);

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

static bool reaches(const struct tfd_mr *mr, uint64_t address, uint64_t length)
{
	return address <= mr->length && length <= mr->length - address;
}

/* Fills in what is to be copied; whether the far side lets us. */
static bool copy_make(struct tfd_domain *domain, const struct tfd_post *post, struct tfd_local_copy *copy)
{
	const struct tfd_post_part first = { post->local, post->remote_address, post->length };
	const struct tfd_mr *mr = NULL;

	copy->broken = NULL;
	copy->count = 0;
	copy->streams = post->job_bytes >= STREAM_BYTES;
	if (!post->length)
		return true;
	mr = tfd_mr_find_hot(&domain->memory, post->remote_key);
	if (!mr || !(post->read ? mr->readable : mr->writable))
		return false;
	if (post->read)
		copy->broken = mr->broken;
	for (uint32_t i = 0; i <= post->part_count; i++) {
		const struct tfd_post_part *from = i ? &post->parts[i - 1] : &first;
		uint8_t *local = (uint8_t *)(uintptr_t)from->local;
		uint8_t *remote;

		if (!reaches(mr, from->remote_address, from->length))
			return false;
		remote = mr->base + from->remote_address;
		copy->parts[i] = post->read ? (struct tfd_local_part){ local, remote, from->length } :
		                              (struct tfd_local_part){ remote, local, from->length };
	}
	copy->count = post->part_count + 1;
	return true;
}

static uint64_t bytes_of(const struct tfd_post *post)
{
	uint64_t bytes = post->length;

	for (uint32_t i = 0; i < post->part_count; i++)
		bytes += post->parts[i].length;
	return bytes;
}

static int post_at_once(struct tfd_domain *domain, const struct tfd_post *post, struct op *op, uint64_t bytes)
{
	if (domain->pass_bytes >= PASS_BYTES)
		return -EAGAIN;
	domain->pass_bytes += bytes;
	op->refused = !copy_make(domain, post, &domain->copy);
	op->state = op->refused ? TFD_LOCAL_COPIED : tfd_local_copy_run(&domain->copy);
	return 0;
}

static int post_by_helper(struct tfd_domain *domain, const struct tfd_post *post, struct op *op)
{
	struct tfd_local_task *task = tfd_local_helpers_take(&domain->helpers);

	if (!task)
		return -EAGAIN;
	op->refused = !copy_make(domain, post, &task->copy);
	op->state = op->refused ? TFD_LOCAL_COPIED : TFD_LOCAL_COPYING;
	task->state = &op->state;
	if (!op->refused)
		tfd_local_helpers_give(&domain->helpers);
	return 0;
}

static int post(struct tfd_half *half, const struct tfd_post *post, struct tfd_wr *wr)
{
	struct tfd_domain *domain = half->domain;
	uint64_t bytes = bytes_of(post);
	struct op *op;
	int rc;

	if (!half->far || half->broken)
		return -ENOTCONN;
	if (bytes > MESSAGE_BYTES)
		return -EMSGSIZE;
	if (post->read && post->length && !post->mr->writable)
		return -EACCES;
	if (queue_count(domain) == QUEUE_ENTRIES)
		return -EAGAIN;
	op = &domain->queue[domain->tail % QUEUE_ENTRIES];
	*op = (struct op){ .wr = wr,
	                   .half = half,
	                   .far_owner = half->far->owner,
	                   .imm = post->imm,
	                   .has_imm = post->has_imm != 0 };
	rc = domain->helpers.count && bytes >= HELP_BYTES ? post_by_helper(domain, post, op) :
	                                                    post_at_once(domain, post, op, bytes);
	if (rc)
		return rc;
	half->broken = half->broken || op->refused;
	domain->tail++;
	return 0;
}

/* Whether there is something to tell of the oldest post. Its bytes are visible then. */
static bool has_news(struct tfd_domain *domain)
{
	/* pairs with the helper's store of state */
	return queue_count(domain) &&
	       tfd_load_seq(&domain->queue[domain->head % QUEUE_ENTRIES].state) != TFD_LOCAL_COPYING;
}

static void tell(struct tfd_domain *domain, struct op *op, struct tfd_wc *wc)
{
	bool fails = op->refused || tfd_load_relaxed(&op->state) == TFD_LOCAL_GONE;

	if (fails) {
		op->half->broken = true;
		*wc = (struct tfd_wc){
			.type = TFD_WC_ERROR, .wr = op->wr, .error = EACCES, .remote_access = 1
		};
	} else if (op->has_imm) {
		op->has_imm = false;
		*wc = (struct tfd_wc){ .type = TFD_WC_IMM, .imm = op->imm, .owner = op->far_owner };
		return;
	} else {
		*wc = (struct tfd_wc){ .type = TFD_WC_SENT, .wr = op->wr };
	}
	domain->head++;
}

static void sleeps(struct tfd_domain *domain, bool asleep)
{
	uint64_t ignored;

	/* pairs with task_run: it stores its task's state, then looks at worker_sleeps */
	tfd_store_seq(&domain->helpers.worker_sleeps, asleep);
	if (!asleep)
		(void)!read(domain->wake_fd, &ignored, sizeof(ignored));
}

static int poll(struct tfd_domain *domain, struct tfd_wc *wc, int max)
{
	int count = 0;

	domain->pass_bytes = 0;
	if (tfd_load_relaxed(&domain->helpers.worker_sleeps))
		sleeps(domain, false);
	while (count < max && has_news(domain))
		tell(domain, &domain->queue[domain->head % QUEUE_ENTRIES], &wc[count++]);
	return count;
}

static int half_drain(struct tfd_half *half, struct tfd_wc *wc, int max)
{
	return poll(half->domain, wc, max);
}

static int wait_fd(struct tfd_domain *domain)
{
	return domain->wake_fd;
}

/*
 * Only the worker's own posts make work here: what its helpers have not done yet, they tell. One of them may be late and tell what is
 * known by then: the poll after the sleep takes that, too.
 */
static int arm(struct tfd_domain *domain)
{
	if (domain->helpers.count)
		sleeps(domain, true);
	if (!has_news(domain))
		return 0;
	if (domain->helpers.count)
		sleeps(domain, false);
	return -EAGAIN;
}

const struct tfd_provider_ops tfd_local_ops = {
	.name = "local",
	.path_id = TFD_PATH_LOCAL,
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
