/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The tcp provider against far sides that are none: peers that know a half's token and speak nonsense by it, forge tables, stop in the
 * midst of a message, do not read. What they do costs their own connection; another one goes on meanwhile, and no byte lands where it
 * must not.
 */
#include "tcp_peer.h"

/* ---- nonsense from one who knows the token ---- */

static void expect_broken(struct peer *peer, bool garbled)
{
	uint32_t errors = 0;

	CHECK(is_closed(peer->fd, true));
	for (uint32_t i = 0; i < b_told.count; i++) {
		CHECK(b_told.wc[i].type != TFD_WC_IMM);
		errors += b_told.wc[i].type == TFD_WC_ERROR && !b_told.wc[i].wr &&
		          b_told.wc[i].owner == &peer->owner && b_told.wc[i].error == EPROTO;
	}
	CHECK(errors == garbled);
	check_untouched();
	peer_close(peer);
	check_good();
}

/* One change each of a write that would be fine. */
static void spoil(struct tfd_tcp_header *header, int what)
{
	switch (what) {
	case 0:
		header->magic++;
		break;
	case 1:
		header->type = 0;
		break;
	case 2:
		header->type = 6;
		break;
	case 3:
		header->type = 255;
		break;
	case 4:
		header->_zero = 1;
		break;
	case 5:
		header->flags |= 0x80;
		break;
	case 6:
		header->number++;
		break;
	case 7:
		header->number = 0;
		break;
	case 8:
		header->ack = 1; /* of what was never sent */
		break;
	case 9:
		header->ack = UINT64_MAX;
		break;
	case 10:
		header->total++;
		break;
	case 11:
		header->total = header->length = UINT64_MAX;
		break;
	case 12:
		header->total = header->length = TFD_TCP_TOTAL_MAX + 1;
		break;
	case 13:
		header->parts = TFD_TCP_PARTS_MAX;
		break;
	case 14:
		header->parts = UINT16_MAX;
		break;
	case 15: /* data of a read that nobody asked for */
		header->type = TFD_TCP_DATA;
		header->flags = 0;
		break;
	case 16:
		header->type = TFD_TCP_REFUSED;
		header->flags = 0;
		break;
	case 17:
		header->type = TFD_TCP_REFUSED;
		header->flags = TFD_TCP_OF_READ;
		header->total = header->length = 0;
		break;
	case 18:
		header->type = TFD_TCP_ACK; /* with a payload */
		header->flags = 0;
		break;
	case 19:
		header->type = TFD_TCP_READ; /* that is to have an immediate */
		break;
	case 20:
		header->type = TFD_TCP_READ;
		header->flags = 0;
		header->number = 2;
		break;
	default:
		header->type = TFD_TCP_READ;
		header->flags = 0;
		header->parts = 1;
		break;
	}
}

#define SPOILS 22

static void test_headers(void)
{
	for (int what = 0; what < SPOILS; what++) {
		struct tfd_tcp_header header;
		uint8_t payload[256] = { 0 };
		struct peer peer;

		peer_open(&peer);
		told_clear();
		header = header_of(&peer, TFD_TCP_WRITE, sizeof(payload));
		header.flags = TFD_TCP_HAS_IMM;
		spoil(&header, what);
		put(peer.fd, &header, sizeof(header));
		(void)send(peer.fd, payload, sizeof(payload), MSG_NOSIGNAL);
		expect_broken(&peer, true);
	}
}

/* Random bytes after the hello, and headers of which a few bytes are random. */
static void test_noise(void)
{
	uint64_t random = 99;

	for (int round = 0; round < 300; round++) {
		struct peer peer;
		uint8_t noise[600];

		peer_open(&peer);
		told_clear();
		for (size_t i = 0; i < sizeof(noise); i++) {
			random = random * 6364136223846793005ull + 1442695040888963407ull;
			noise[i] = (uint8_t)(random >> 33);
		}
		if (round % 2) {
			struct tfd_tcp_header header = header_of(&peer, (uint8_t)(1 + round % 5), 8);

			header.key ^= 1ull << 40;
			memcpy(noise, &header, sizeof(header));
			for (int i = 0; i < 2; i++) {
				random = random * 6364136223846793005ull + 1442695040888963407ull;
				noise[4 + (random >> 40) % 60] ^= (uint8_t)(random >> 33);
			}
		}
		put(peer.fd, noise, sizeof(noise));
		(void)shutdown(peer.fd, SHUT_WR);
		CHECK(is_closed(peer.fd, true));
		for (uint32_t i = 0; i < b_told.count; i++)
			CHECK(b_told.wc[i].type == TFD_WC_ERROR);
		check_untouched();
		peer_close(&peer);
	}
	check_good();
}

/* ---- forged tables ---- */

static void test_tables(void)
{
	for (int what = 0; what < 10; what++) {
		struct tfd_tcp_range table[3] = { { 1000, 100 }, { 3000, 100 }, { 5000, 100 } };
		uint8_t payload[400] = { 0 };
		struct tfd_tcp_header header;
		struct peer peer;
		bool refused = false;

		peer_open(&peer);
		told_clear();
		header = header_of(&peer, TFD_TCP_WRITE, 100);
		header.flags = TFD_TCP_HAS_IMM;
		header.parts = 3;
		header.total = 400;
		switch (what) {
		case 0:
			table[2].length = 101;
			break;
		case 1:
			table[1].length = 0;
			break;
		case 2:
			table[1].length = UINT64_MAX - 99; /* the sum comes out right again */
			table[2].length = 200;
			break;
		case 3:
			header.length = 0;
			header.total = 300;
			break;
		case 4:
			header.total = 0;
			break;
		case 5:
			table[2].address = BYTES - 99;
			refused = true;
			break;
		case 6:
			table[2].address = UINT64_MAX - 10;
			refused = true;
			break;
		case 7:
			header.address = BYTES;
			refused = true;
			break;
		case 8:
			header.key ^= 1ull << 33;
			refused = true;
			break;
		default:
			header.key = a.key.key; /* of another rail */
			refused = true;
			break;
		}
		put(peer.fd, &header, sizeof(header));
		put(peer.fd, table, sizeof(table));
		(void)send(peer.fd, payload, sizeof(payload), MSG_NOSIGNAL);
		if (refused) { /* is told so, and nothing after it lands */
			struct tfd_tcp_header answer;

			for (int round = 0;
			     recv(peer.fd, &answer, sizeof(answer), MSG_DONTWAIT) != sizeof(answer);
			     round++) {
				CHECK(round < ROUNDS);
				(void)both_poll();
			}
			CHECK(answer.type == TFD_TCP_REFUSED && answer.number == 1 && !answer.flags);
			header = header_of(&peer, TFD_TCP_WRITE, 8);
			put(peer.fd, &header, sizeof(header));
			put(peer.fd, payload, 8);
			(void)shutdown(peer.fd, SHUT_WR);
		}
		expect_broken(&peer, !refused);
	}
}

/* ---- a flood ---- */

static void flood_put(struct peer *peer)
{
	static const uint8_t payload[65536];

	while (send(peer->fd, payload, sizeof(payload), MSG_NOSIGNAL | MSG_DONTWAIT) > 0)
		continue;
}

/* Halves that always have more to be read do not put off that another's message is noticed. */
static void test_noticed_beside_flood(void)
{
	void *memory = mmap(NULL, TFD_TCP_TOTAL_MAX, PROT_READ | PROT_WRITE,
	                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	struct tfd_tcp_header header;
	struct peer floods[2], small;
	struct tfd_region_key key;
	struct tfd_mr *mr;
	uint32_t polls = 0;

	CHECK(memory != MAP_FAILED);
	CHECK_OK(ops->mr_open(b.domain, memory, TFD_TCP_TOTAL_MAX, 1, &mr, &key, &error));
	for (int i = 0; i < 2; i++) {
		peer_open(&floods[i]);
		header = header_of(&floods[i], TFD_TCP_WRITE, TFD_TCP_TOTAL_MAX);
		header.key = key.key;
		put(floods[i].fd, &header, sizeof(header));
	}
	peer_open(&small);
	told_clear();
	for (int i = 0; !b_told.count; i++) {
		CHECK(i < 200);
		if (i == 32) { /* by then they are read by as much as there may be */
			b.domain->passes = 0;
			header = header_of(&small, TFD_TCP_WRITE, 0);
			header.flags = TFD_TCP_HAS_IMM;
			put(small.fd, &header, sizeof(header));
		}
		flood_put(&floods[0]);
		flood_put(&floods[1]);
		(void)side_poll(&b, &b_told);
		polls += i >= 32;
	}
	CHECK(b_told.count == 1 && b_told.wc[0].owner == &small.owner);
	CHECK(polls <= 3);
	for (int i = 0; i < 2; i++)
		peer_close(&floods[i]);
	peer_close(&small);
	ops->mr_close(b.domain, mr);
	(void)munmap(memory, TFD_TCP_TOTAL_MAX);
}

/* ---- cut short ---- */

/* The connection ends anywhere in a message of many parts: its bytes may have landed in their places, its count not. */
static void test_truncated(void)
{
	enum { PARTS = 20, PART = 700 };
	uint8_t stream[sizeof(struct tfd_tcp_header) + (PARTS - 1) * sizeof(struct tfd_tcp_range) +
	               PARTS * PART];

	for (size_t end = 1; end < sizeof(stream); end += 997) {
		struct tfd_tcp_range *table = (void *)(stream + sizeof(struct tfd_tcp_header));
		struct tfd_tcp_header header;
		struct peer peer;

		peer_open(&peer);
		told_clear();
		header = header_of(&peer, TFD_TCP_WRITE, PART);
		header.parts = PARTS - 1;
		header.total = PARTS * PART;
		header.flags = TFD_TCP_HAS_IMM;
		memset(stream, 0x77, sizeof(stream));
		memcpy(stream, &header, sizeof(header));
		for (uint32_t i = 0; i < PARTS - 1; i++)
			table[i] = (struct tfd_tcp_range){ 2000 * (i + 1), PART };
		put(peer.fd, stream, end);
		if (end % 2)
			poll_quiet();
		CHECK(shutdown(peer.fd, SHUT_WR) == 0);
		CHECK(is_closed(peer.fd, true));
		CHECK(!b_told.count);
		for (uint32_t i = 0; i < BYTES; i++)
			CHECK(b.memory[i] == UNTOUCHED ||
			      (b.memory[i] == 0x77 && i / 2000 < PARTS && i % 2000 < PART));
		peer_close(&peer);
		check_good();
	}
}

/* The same message in pieces of any size lands whole. */
static void test_dribble(void)
{
	for (size_t step = 1; step < 400; step = step * 3 + 1) {
		struct tfd_tcp_range table[2] = { { 9000, 300 }, { 100, 1 } };
		struct tfd_tcp_header header;
		uint8_t stream[sizeof(header) + sizeof(table) + 501];
		struct peer peer;

		peer_open(&peer);
		told_clear();
		header = header_of(&peer, TFD_TCP_WRITE, 200);
		header.parts = 2;
		header.total = 501;
		header.flags = TFD_TCP_HAS_IMM;
		header.imm = 4711;
		memcpy(stream, &header, sizeof(header));
		memcpy(stream + sizeof(header), table, sizeof(table));
		for (uint32_t i = 0; i < 501; i++)
			stream[sizeof(header) + sizeof(table) + i] = (uint8_t)i;
		for (size_t at = 0; at < sizeof(stream); at += step) {
			CHECK(!b_told.count);
			put(peer.fd, stream + at, at + step < sizeof(stream) ? step : sizeof(stream) - at);
			for (int i = 0; i < 3; i++)
				(void)side_poll(&b, &b_told);
		}
		await_told(0, 1);
		CHECK(b_told.wc[0].type == TFD_WC_IMM && b_told.wc[0].imm == 4711 &&
		      b_told.wc[0].owner == &peer.owner);
		for (uint32_t i = 0; i < 200; i++)
			CHECK(b.memory[i + 0] == (i == 100 ? (uint8_t)500 : (uint8_t)i));
		for (uint32_t i = 0; i < 300; i++)
			CHECK(b.memory[9000 + i] == (uint8_t)(200 + i));
		peer_close(&peer);
		check_good();
	}
}

/* ---- peers that are stuck ---- */

/* Asks for more reads at a time than anybody may. */
static void test_too_many_reads(void)
{
	struct peer peer;

	peer_open(&peer);
	told_clear();
	for (uint32_t i = 0; i < TFD_TCP_READS + 1; i++) {
		struct tfd_tcp_header header = header_of(&peer, TFD_TCP_READ, BYTES);

		header.number = i + 1;
		put(peer.fd, &header, sizeof(header));
	}
	for (int round = 0; round < ROUNDS && peer.half->fd >= 0; round++)
		(void)both_poll();
	CHECK(peer.half->lost && b_told.count == 1 && b_told.wc[0].error == EPROTO);
	check_untouched();
	peer_close(&peer);
	check_good();
}

/* Asks for much and does not read; writes and does not take acknowledgements; stops in a message. The others go on. */
static void test_stuck(void)
{
	struct peer asks, mutters, writes;
	struct tfd_tcp_header header;
	uint8_t payload[64] = { 0 };

	peer_open(&asks);
	peer_open(&mutters);
	peer_open(&writes);
	for (uint32_t i = 0; i < TFD_TCP_READS; i++) {
		header = header_of(&asks, TFD_TCP_READ, BYTES);
		header.number = i + 1;
		put(asks.fd, &header, sizeof(header));
	}
	header = header_of(&mutters, TFD_TCP_WRITE, 1000);
	put(mutters.fd, &header, sizeof(header));
	put(mutters.fd, payload, sizeof(payload));
	told_clear();
	for (uint32_t i = 0; i < 2000; i++) {
		header = header_of(&writes, TFD_TCP_WRITE, sizeof(payload));
		header.address = 1u << 20;
		put(writes.fd, &header, sizeof(header));
		put(writes.fd, payload, sizeof(payload));
		(void)both_poll();
	}
	poll_quiet();
	CHECK(ops->arm(b.domain) == 0); /* none of them keeps the worker awake */
	for (int i = 0; i < 50; i++)
		write_imm(&good, 100000, (uint32_t)i);
	CHECK(!asks.half->lost && !mutters.half->lost && !writes.half->lost);
	CHECK(writes.half->receive.writes == 2000);
	memset(b.memory, UNTOUCHED, BYTES);
	peer_close(&asks);
	peer_close(&mutters);
	peer_close(&writes);
	check_good();
}

/* ---- towards us ---- */

/* A far side that acknowledges, answers and refuses what it likes: our own piece ends once, as it must. */
static void test_answers(void)
{
	for (int what = 0; what < 9; what++) {
		struct tfd_post post = {
			.local = b.memory, .mr = b.mr, .length = 100, .remote_key = 1, .read = what >= 4
		};
		struct tfd_tcp_header header;
		uint8_t payload[128] = { 0 };
		struct tfd_wr wr = { 0 };
		struct peer peer;

		peer_open(&peer);
		told_clear();
		post_when_up(peer.half, &post, &wr);
		poll_quiet();
		CHECK(!b_told.count);
		header = header_of(&peer, TFD_TCP_ACK, 0);
		header.number = 0;
		header.key = 0;
		switch (what) {
		case 0: /* fine */
			header.ack = 1;
			break;
		case 1:
			header.ack = 2;
			break;
		case 2: /* fine, too */
			header.type = TFD_TCP_REFUSED;
			header.number = 1;
			break;
		case 3:
			header.type = TFD_TCP_REFUSED;
			header.number = 2;
			break;
		case 4: /* fine */
			header.type = TFD_TCP_DATA;
			header.number = 1;
			header.length = header.total = 100;
			break;
		case 5:
			header.type = TFD_TCP_DATA;
			header.number = 1;
			header.length = header.total = 101;
			break;
		case 6:
			header.type = TFD_TCP_DATA;
			header.number = 1; /* nothing at all */
			break;
		case 7:
			header.type = TFD_TCP_DATA;
			header.number = 2;
			header.length = header.total = 100;
			break;
		default: /* fine */
			header.type = TFD_TCP_REFUSED;
			header.flags = TFD_TCP_OF_READ;
			header.number = 1;
			break;
		}
		put(peer.fd, &header, sizeof(header));
		(void)send(peer.fd, payload, header.total, MSG_NOSIGNAL);
		for (int round = 0; round < ROUNDS && !b_told.count; round++)
			(void)both_poll();
		poll_quiet();
		CHECK(b_told.wc[0].wr == &wr);
		CHECK((b_told.wc[0].type == TFD_WC_SENT) == (what == 0 || what == 4));
		CHECK(b_told.wc[0].remote_access == (what == 2 || what == 8));
		CHECK((b_told.count == 2) == (what == 1 || what == 3 || (what >= 5 && what <= 7)));
		memset(b.memory, UNTOUCHED, 100);
		check_untouched();
		peer_close(&peer);
		check_good();
	}
}

int main(void)
{
	sides_open();
	pair_open(&good);
	check_good();
	test_headers();
	test_noise();
	test_tables();
	test_noticed_beside_flood();
	test_truncated();
	test_dribble();
	test_too_many_reads();
	test_stuck();
	test_answers();
	pair_close(&good);
	sides_close();
	return 0;
}
