/* SPDX-License-Identifier: Apache-2.0 */
/* Two rails with memory, what is posted on them and what they tell. */
#include "conformance.h"

#include <dirent.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define POLL_MAX 64
#define QUIET_PASSES 100
#define QUIET_NS 2000000u

uint32_t load(uint32_t usual)
{
	uint32_t count = (uint32_t)((uint64_t)usual * settings.load / 100);

	return count ? count : 1;
}

/* ---- sides ---- */

static void side_open(struct rig *rig, uint32_t index)
{
	struct side *side = &rig->sides[index];
	uint8_t *mapping = mmap(NULL, MEMORY_BYTES + 2 * PAGE_BYTES, PROT_READ | PROT_WRITE,
	                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(mapping != MAP_FAILED);
	memset(mapping, GUARD, PAGE_BYTES);
	memset(mapping + PAGE_BYTES + MEMORY_BYTES, GUARD, PAGE_BYTES);
	side->memory = mapping + PAGE_BYTES;
	if (index && rig->one_domain) {
		side->domain = rig->sides[0].domain;
		side->info = rig->sides[0].info;
	} else {
		CHECK_OK(rig->ops->domain_open(&settings.options, settings.rails[index], &side->info,
		                               &side->domain, &error));
	}
	if (settings.device)
		device_open(side);
	else
		CHECK_OK(rig->ops->mr_open(side->domain, side->memory, MEMORY_BYTES, 1, &side->mr, &side->key,
		                           &error));
}

struct rig *rig_open(void)
{
	struct rig *rig = calloc(1, sizeof(*rig));

	CHECK(rig);
	rig->ops = settings.ops;
	/* Its two ends are sessions of one group. */
	rig->one_domain =
		settings.ops->path_id == TFD_PATH_LOCAL ||
		(settings.ops->path_id == TFD_PATH_STAGED && strcmp(settings.options.fabric, "local") == 0);
	rig->pieces = calloc(PIECES, sizeof(*rig->pieces));
	CHECK(rig->pieces);
	for (uint32_t i = 0; i < PIECES; i++)
		rig->piece_free[rig->piece_free_count++] = PIECES - 1 - i;
	side_open(rig, 0);
	side_open(rig, 1);
	return rig;
}

void rig_guards(const struct rig *rig)
{
	for (uint32_t i = 0; i < 2; i++) {
		const uint8_t *memory = rig->sides[i].memory;

		if (memory)
			CHECK(all_are(memory - PAGE_BYTES, PAGE_BYTES, GUARD) &&
			      all_are(memory + MEMORY_BYTES, PAGE_BYTES, GUARD));
	}
}

void rig_close(struct rig *rig)
{
	CHECK(!rig->in_flight);
	rig_guards(rig);
	for (uint32_t i = 2; i-- > 0;) {
		struct side *side = &rig->sides[i];

		if (side->domain && side->mr)
			rig->ops->mr_close(side->domain, side->mr);
		if (side->domain && side->device)
			device_close(side);
		if (side->domain && !(i && rig->one_domain))
			rig->ops->domain_close(side->domain);
		if (side->memory)
			CHECK(munmap(side->memory - PAGE_BYTES, MEMORY_BYTES + 2 * PAGE_BYTES) == 0);
	}
	free(rig->arrivals);
	free(rig->pieces);
	free(rig);
}

/* ---- what is told ---- */

static void piece_told(struct rig *rig, const struct tfd_wc *wc)
{
	struct piece *piece = (struct piece *)(void *)wc->wr;

	if (piece < rig->pieces || piece >= rig->pieces + PIECES)
		FAIL("a completion names a work request that was never posted");
	if (piece->state != PIECE_POSTED)
		FAIL("a piece was told of twice");
	piece->state = PIECE_TOLD;
	rig->in_flight--;
	if (wc->type == TFD_WC_SENT) {
		rig->sent++;
		if (rig->on_sent)
			rig->on_sent(rig, piece);
	} else {
		CHECK(wc->error > 0);
		rig->failed++;
		piece->error = wc->error;
		piece->refused = wc->remote_access != 0;
		rig->refused += piece->refused;
		if (!rig->faults)
			FAIL("a piece of %llu bytes failed: %s", (unsigned long long)piece->post.length,
			     strerror(wc->error));
	}
	if (!piece->kept)
		piece_give(rig, piece);
}

static void imm_told(struct rig *rig, uint32_t side, const struct tfd_wc *wc)
{
	uint32_t channels = rig->sides[side].info.channels;

	if (rig->arrival_count == rig->arrival_capacity) {
		rig->arrival_capacity = rig->arrival_capacity ? 2 * rig->arrival_capacity : 4096;
		rig->arrivals = realloc(rig->arrivals, rig->arrival_capacity * sizeof(*rig->arrivals));
		CHECK(rig->arrivals);
	}
	CHECK(wc->order < (channels ? channels : 1));
	rig->arrivals[rig->arrival_count++] =
		(struct arrival){ .imm = wc->imm, .order = wc->order, .owner = wc->owner, .side = side };
	if (rig->on_imm)
		rig->on_imm(rig, &rig->arrivals[rig->arrival_count - 1]);
}

void rig_take(struct rig *rig, uint32_t side, const struct tfd_wc *wc)
{
	if (wc->type == TFD_WC_IMM) {
		imm_told(rig, side, wc);
	} else if (wc->type != TFD_WC_SENT && wc->type != TFD_WC_ERROR) {
		FAIL("a completion of type %u", wc->type);
	} else if (wc->wr) {
		piece_told(rig, wc);
	} else {
		CHECK(wc->type == TFD_WC_ERROR);
		if (wc->error == EOVERFLOW || !rig->faults)
			FAIL("the rail told an error of its own: %s", strerror(wc->error));
		rig->domain_errors++;
	}
}

static uint32_t poll_side(struct rig *rig, uint32_t side)
{
	struct tfd_wc wc[POLL_MAX];
	int max = 1 + (int)(rig->arrival_count + rig->sent) % POLL_MAX; /* all of them are asked for */
	int count = rig->ops->poll(rig->sides[side].domain, wc, max);

	CHECK(count >= 0 && count <= max);
	for (int i = 0; i < count; i++)
		rig_take(rig, side, &wc[i]);
	return (uint32_t)count;
}

uint32_t rig_poll(struct rig *rig, uint32_t sides)
{
	uint32_t told = 0;

	if (rig->one_domain)
		return sides && rig->sides[0].domain ? poll_side(rig, 0) : 0;
	for (uint32_t i = 0; i < 2; i++) {
		if ((sides & 1u << i) && rig->sides[i].domain)
			told += poll_side(rig, i);
	}
	return told;
}

uint32_t rig_pass(struct rig *rig)
{
	uint32_t told = rig_poll(rig, 3);

	if (!told)
		(void)sched_yield();
	return told;
}

void rig_settle(struct rig *rig)
{
	uint64_t since_ns = tfd_now_ns();

	for (int quiet = 0; quiet < QUIET_PASSES || tfd_now_ns() - since_ns < QUIET_NS; quiet++) {
		if (!rig_pass(rig))
			continue;
		quiet = 0;
		since_ns = tfd_now_ns();
	}
}

struct patience patience_begin(void)
{
	return (struct patience){ .since_ns = tfd_now_ns() };
}

bool patience_pass(struct rig *rig, struct patience *patience)
{
	if (rig_pass(rig)) {
		patience->since_ns = tfd_now_ns();
		return true;
	}
	return tfd_now_ns() - patience->since_ns < PATIENCE_NS;
}

/* ---- posting ---- */

struct tfd_post post_write(const struct pair *pair, uint64_t from_offset, uint64_t to_offset, uint64_t length)
{
	return (struct tfd_post){ .local = pair->from->memory + from_offset,
	                          .mr = length ? pair->from->mr : NULL,
	                          .length = length,
	                          .remote_address = pair->to->key.address + to_offset,
	                          .remote_key = pair->to->key.key };
}

void piece_give(struct rig *rig, struct piece *piece)
{
	CHECK(piece->state == PIECE_TOLD);
	piece->state = PIECE_FREE;
	rig->piece_free[rig->piece_free_count++] = (uint32_t)(piece - rig->pieces);
}

struct piece *rig_try(struct rig *rig, struct tfd_half *half, const struct tfd_post *post, int *rc)
{
	struct piece *piece;

	*rc = -EAGAIN;
	if (!rig->piece_free_count)
		return NULL;
	piece = &rig->pieces[rig->piece_free[--rig->piece_free_count]];
	*piece = (struct piece){ .half = half, .post = *post, .state = PIECE_POSTED };
	rig->in_flight++;
	*rc = rig->ops->post(half, post, &piece->wr);
	if (*rc == 0)
		return piece;
	CHECK(*rc < 0 && piece->state == PIECE_POSTED);
	rig->in_flight--;
	piece->state = PIECE_TOLD;
	piece_give(rig, piece);
	return NULL;
}

struct piece *rig_post(struct rig *rig, struct tfd_half *half, const struct tfd_post *post)
{
	struct piece *piece;
	int rc;

	AWAIT(rig, (piece = rig_try(rig, half, post, &rc)) != NULL || rc != -EAGAIN);
	if (!piece)
		FAIL("a post of %llu bytes: %s", (unsigned long long)post->length, strerror(-rc));
	piece->kept = true;
	return piece;
}

void rig_send(struct rig *rig, struct tfd_half *half, const struct tfd_post *post)
{
	rig_post(rig, half, post)->kept = false;
}

int rig_run(struct rig *rig, struct tfd_half *half, const struct tfd_post *post, bool *refused)
{
	struct piece *piece = rig_post(rig, half, post);
	int result;

	AWAIT(rig, piece->state == PIECE_TOLD);
	result = piece->error;
	if (refused)
		*refused = piece->refused;
	piece_give(rig, piece);
	return result;
}

void rig_write(struct rig *rig, struct pair *pair, uint64_t length, const uint32_t *imm)
{
	struct tfd_post post = post_write(pair, 0, 0, length);
	uint32_t before = rig->arrival_count;

	pattern_fill(pair->from->memory, length, length + before);
	memset(pair->to->memory, 0, length);
	if (imm) {
		post.has_imm = 1;
		post.imm = *imm;
	}
	CHECK(rig_run(rig, pair->out.half, &post, NULL) == 0);
	CHECK(pattern_is(pair->to->memory, length, length + before));
	if (!imm)
		return;
	AWAIT(rig, rig->arrival_count > before);
	CHECK(rig->arrival_count == before + 1 && rig->arrivals[before].imm == *imm);
	CHECK(owned_by(rig, &rig->arrivals[before], &pair->in));
}

/* ---- bytes ---- */

uint64_t mix(uint64_t seed)
{
	seed += 0x9e3779b97f4a7c15ull;
	seed = (seed ^ seed >> 30) * 0xbf58476d1ce4e5b9ull;
	seed = (seed ^ seed >> 27) * 0x94d049bb133111ebull;
	return seed ^ seed >> 31;
}

void pattern_fill(uint8_t *bytes, uint64_t length, uint64_t seed)
{
	uint64_t word = mix(seed) | 1;

	for (uint64_t at = 0; at < length; at += sizeof(word)) {
		memcpy(bytes + at, &word, length - at < sizeof(word) ? length - at : sizeof(word));
		word = word * 6364136223846793005ull + 1442695040888963407ull;
	}
}

bool pattern_is(const uint8_t *bytes, uint64_t length, uint64_t seed)
{
	uint64_t word = mix(seed) | 1;

	for (uint64_t at = 0; at < length; at += sizeof(word)) {
		if (memcmp(bytes + at, &word, length - at < sizeof(word) ? length - at : sizeof(word)) != 0)
			return false;
		word = word * 6364136223846793005ull + 1442695040888963407ull;
	}
	return true;
}

bool all_are(const uint8_t *bytes, uint64_t length, uint8_t value)
{
	return !length || (bytes[0] == value && memcmp(bytes, bytes + 1, length - 1) == 0);
}

/* ---- what the process holds ---- */

static uint32_t count_entries(const char *path)
{
	DIR *directory = opendir(path);
	uint32_t count = 0;

	CHECK(directory);
	while (readdir(directory))
		count++;
	(void)closedir(directory);
	return count;
}

uint32_t count_fds(void)
{
	return count_entries("/proc/self/fd");
}

uint32_t count_threads(void)
{
	return count_entries("/proc/self/task");
}
