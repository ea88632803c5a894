/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Provider verbs on the double of libibverbs: random posts by several connections that break at random, and are made anew.
 *
 *   told      each post once; as SENT only what has landed
 *   landed    by each channel the immediates in the order of the posts, without a gap, each after its bytes
 *   left      at the end all room of the send queue, all receives, and nothing else
 *
 *   test_verbs_random [seed] [steps]
 */
#include "verbs_soft.h"

#define PAIRS 4u
#define CHANNELS TFD_VERBS_CHANNELS
#define SLOTS 64u /* posts of a channel whose memory is in use */
#define PART_BYTES 16u
#define SLOT_BYTES (PART_BYTES * TFD_VERBS_PARTS)
#define STEPS 20000u

struct piece {
	struct tfd_wr wr;
	uint32_t number; /* of the channel */
	uint32_t bytes;
	bool used, has_imm, told, landed;
};

struct way {
	struct piece pieces[SLOTS];
	uint32_t posted;
	uint32_t next_landed; /* before which no immediate is missing */
};

struct pair {
	struct joined joined;
	struct way ways[CHANNELS];
	bool broken;
};

static struct pair pairs[PAIRS];
static uint64_t state;
static uint32_t under_way; /* immediates that may be in b's queue */
static uint32_t sent, failed, landed, ends;

static uint32_t any(uint32_t below)
{
	state = state * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)(state >> 33) % below;
}

static uint64_t slot_of(const struct pair *pair, uint32_t channel, uint32_t slot)
{
	return (((uint64_t)(pair - pairs) * CHANNELS + channel) * SLOTS + slot) * SLOT_BYTES;
}

static struct piece *free_piece(struct way *way)
{
	struct piece *piece = &way->pieces[way->posted % SLOTS];

	if (piece->used && (!piece->told || (piece->has_imm && !piece->landed)))
		return NULL;
	return piece;
}

static void post_one(struct pair *pair)
{
	uint32_t channel = any(CHANNELS);
	struct way *way = &pair->ways[channel];
	struct piece *piece = free_piece(way);
	struct tfd_post_part parts[TFD_VERBS_PARTS - 1];
	struct tfd_post post;
	uint32_t count = any(3) ? 1 : 1 + any(TFD_VERBS_PARTS), last = 1 + any(PART_BYTES);
	uint64_t at;
	int rc;

	if (!piece || pair->broken || under_way == b.info.imm_depth)
		return;
	at = slot_of(pair, channel, way->posted % SLOTS);
	*piece = (struct piece){ .number = way->posted, .has_imm = any(2) };
	piece->bytes = (count - 1) * PART_BYTES + last;
	for (uint32_t i = 0; i < piece->bytes; i++)
		a.memory[at + i] = (uint8_t)any(256);
	post = piece_of(&a, &b, count > 1 ? PART_BYTES : last);
	post.local = a.memory + at;
	post.remote_address += at;
	post.traffic = channel;
	post.has_imm = piece->has_imm;
	post.imm = way->posted;
	post.part_count = count - 1;
	post.parts = parts;
	for (uint32_t i = 1; i < count; i++)
		parts[i - 1] = (struct tfd_post_part){ .local = a.memory + at + (size_t)i * PART_BYTES,
		                                       .remote_address =
		                                               b.key.address + at + (uint64_t)i * PART_BYTES,
		                                       .length = i == count - 1 ? last : PART_BYTES };
	rc = ops->post(pair->joined.out, &post, &piece->wr);
	if (rc == -ENOTCONN)
		pair->broken = true;
	if (rc == -EAGAIN || rc == -ENOTCONN)
		return;
	CHECK(!rc);
	piece->used = true;
	way->posted++;
	under_way += piece->has_imm;
}

static void break_owner(const void *owner)
{
	for (uint32_t i = 0; i < PAIRS; i++) {
		if (owner == &pairs[i].joined.writer || owner == &pairs[i].joined.owner)
			pairs[i].broken = true;
	}
}

static void told(const struct tfd_wc *wc)
{
	struct piece *piece = tfd_container(wc->wr, struct piece, wr);
	uint64_t index = (uint64_t)((uint8_t *)piece - (uint8_t *)pairs) / sizeof(struct pair);

	CHECK(index < PAIRS && piece->used && !piece->told);
	piece->told = true;
	if (wc->type == TFD_WC_SENT)
		sent++;
	else
		failed++;
	/* What has failed is not SENT, whatever has become of it. */
	piece->wr.back = wc->type == TFD_WC_SENT;
	if (wc->type == TFD_WC_ERROR)
		pairs[index].broken = true;
}

static void arrived(const struct tfd_wc *wc)
{
	struct pair *pair = pairs;
	struct piece *piece;
	struct way *way;
	uint64_t at;

	while (wc->owner != &pair->joined.owner)
		CHECK(++pair < pairs + PAIRS);
	CHECK(wc->order < CHANNELS);
	way = &pair->ways[wc->order];
	piece = &way->pieces[wc->imm % SLOTS];
	CHECK(piece->used && piece->number == wc->imm && piece->has_imm && !piece->landed);
	for (; way->next_landed < wc->imm; way->next_landed++) /* what lies between brought none */
		CHECK(!way->pieces[way->next_landed % SLOTS].has_imm ||
		      way->pieces[way->next_landed % SLOTS].number != way->next_landed);
	way->next_landed = wc->imm + 1;
	at = slot_of(pair, wc->order, wc->imm % SLOTS);
	CHECK(memcmp(a.memory + at, b.memory + at, piece->bytes) == 0);
	piece->landed = true;
	under_way--;
	landed++;
}

static void handle(const struct tfd_wc *wc, int count)
{
	for (int i = 0; i < count; i++) {
		if (wc[i].type == TFD_WC_IMM)
			arrived(&wc[i]);
		else if (wc[i].wr)
			told(&wc[i]);
		else
			break_owner(wc[i].owner);
		CHECK(wc[i].type != TFD_WC_ERROR || wc[i].wr || wc[i].error == ECONNRESET);
	}
}

static void close_one(struct tfd_half **half)
{
	struct tfd_wc wc[20];
	int count;

	ops->half_close(*half);
	while ((count = ops->half_drain(*half, wc, 1 + (int)any(20))) > 0)
		handle(wc, count);
	ops->half_free(*half);
	*half = NULL;
}

/* The far half first, as daemons do, or the near one, as when they do not reach each other. */
static void end(struct pair *pair)
{
	struct joined *joined = &pair->joined;
	bool near_first = any(2);

	close_one(near_first ? &joined->out : &joined->in);
	close_one(near_first ? &joined->in : &joined->out);
	for (uint32_t i = 0; i < CHANNELS * SLOTS; i++) {
		const struct piece *piece = &pair->ways[i / SLOTS].pieces[i % SLOTS];

		CHECK(!piece->used || piece->told);
		CHECK(!piece->used || !piece->wr.back || !piece->has_imm || piece->landed);
		under_way -= piece->used && piece->has_imm && !piece->landed;
	}
	ends++;
}

static void begin(struct pair *pair)
{
	memset(pair, 0, sizeof(*pair));
	pair_open(&pair->joined);
}

static void hurt(void)
{
	static const int statuses[] = { IBV_WC_REM_ACCESS_ERR, IBV_WC_RETRY_EXC_ERR, IBV_WC_LOC_PROT_ERR,
	                                IBV_WC_REM_OP_ERR };
	const struct joined *pair = &pairs[any(PAIRS)].joined;
	const struct tfd_half *half = any(2) ? pair->in : pair->out;

	switch (any(5)) {
	case 0:
		SOFT(softverbs_late)("soft1", 1);
		(void)SOFT(softverbs_qp_fatal)(pair->in->queues[any(CHANNELS)].number);
		break;
	case 1:
		SOFT(softverbs_wc_fail)(DEVICE, any(40), statuses[any(4)]);
		break;
	case 2:
		SOFT(softverbs_lose_ack)(DEVICE, any(40));
		break;
	case 3:
		(void)SOFT(softverbs_qp_fatal)(half->queues[any(CHANNELS)].number);
		break;
	default:
		SOFT(softverbs_fail)(any(2) ? "ibv_wr_complete" : "ibv_post_send", any(20), ENOMEM);
		break;
	}
}

static void step(void)
{
	struct tfd_wc wc[20];
	struct pair *pair = &pairs[any(PAIRS)];

	switch (any(16)) {
	case 0:
		handle(wc, ops->poll(a.domain, wc, 1 + (int)any(20)));
		break;
	case 1:
	case 2:
		handle(wc, ops->poll(b.domain, wc, 1 + (int)any(20)));
		break;
	case 3:
		(void)ops->arm(any(2) ? a.domain : b.domain);
		break;
	case 4:
		if (!any(20))
			hurt();
		else if (pair->broken || !any(100)) {
			end(pair);
			begin(pair);
		}
		break;
	default:
		post_one(pair);
		break;
	}
}

static void run(const char *configuration, uint32_t plain, uint32_t steps)
{
	struct softverbs_counts counted;
	uint32_t room;

	configure(configuration);
	under_way = 0;
	side_open_with(&a, DEVICE, (struct tfd_verbs_options){ .plain_posts = plain });
	side_open_at(&b, "soft1");
	room = a.domain->send_room;
	for (uint32_t i = 0; i < PAIRS; i++)
		begin(&pairs[i]);
	for (uint32_t i = 0; i < steps; i++)
		step();
	SOFT(softverbs_fail)(NULL, 0, 0);
	for (uint32_t i = 0; i < PAIRS; i++)
		end(&pairs[i]);
	CHECK(!under_way && a.domain->send_room == room);
	SOFT(softverbs_counts)("soft1", &counted);
	CHECK(!counted.rnr && !counted.receives_lost);
	CHECK(counted.srq_entries + b.domain->receives_used == b.domain->receives);
	side_close(&a);
	side_close(&b);
	nothing_is_left();
}

int main(int argc, char **argv)
{
	uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
	uint32_t steps = argc > 2 ? (uint32_t)strtoul(argv[2], NULL, 0) : STEPS;

	(void)unsetenv("TFD_TEST_LIBRARY");
	(void)unsetenv("TFD_TEST_RAIL");
	state = seed;
	run("hurry=1000", 0, steps);
	run("hurry=1000; max_srq_wr=64; max_cqe=160; max_qp_wr=40", 0, steps);
	run("hurry=1000; max_srq_wr=128", 1, steps);
	(void)printf("seed %llu: %u sent, %u failed, %u landed, %u connections\n", (unsigned long long)seed,
	             sent, failed, landed, ends);
	CHECK(sent && failed && landed && ends > 3 * PAIRS);
	return 0;
}
