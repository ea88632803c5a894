/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The libfabric provider on EFA's face (efaface/): what it chooses, writes that overtake each other, a full device, errors, closing
 * in the midst of it.
 */
#include "efa_pair.h"

#define WRITES 200
#define PIECE 4096u

static uint32_t imms_seen[WRITES], imm_count;

/* An immediate tells of its own bytes, whatever else is on its way. */
static void check_imm(const struct tfd_wc *wc)
{
	CHECK(wc->type == TFD_WC_IMM && wc->imm < WRITES && !wc->owner);
	CHECK(!imms_seen[wc->imm]);
	imms_seen[wc->imm] = 1;
	imm_count++;
	for (uint32_t i = 0; i < PIECE; i++)
		CHECK(b.memory[wc->imm * PIECE + i] == (uint8_t)(wc->imm * 7 + i));
}

static void write_all(struct tfd_half *half, struct tfd_wr *wrs)
{
	uint32_t done = 0;

	memset(b.memory, 0, BYTES);
	memset(imms_seen, 0, sizeof(imms_seen));
	imm_count = 0;
	for (uint32_t i = 0; i < WRITES * PIECE; i++)
		a.memory[i] = (uint8_t)(i / PIECE * 7 + i % PIECE);
	for (uint32_t i = 0; i < WRITES; i++) {
		struct tfd_post write = piece_at(i * PIECE, PIECE);
		int rc;

		write.has_imm = 1;
		write.imm = i;
		while ((rc = ops->post(half, &write, &wrs[i])) == -EAGAIN) {
			struct tfd_wc wc;

			if (ops->poll(b.domain, &wc, 1))
				check_imm(&wc);
			if (ops->poll(a.domain, &wc, 1)) {
				CHECK(wc.type == TFD_WC_SENT);
				done++;
			}
		}
		CHECK_OK(rc);
	}
	while (done < WRITES) {
		struct tfd_wc wc = await_done(check_imm);

		CHECK(wc.type == TFD_WC_SENT && wc.wr >= wrs && wc.wr < wrs + WRITES);
		done++;
	}
	while (imm_count < WRITES) {
		struct tfd_wc wc;

		if (ops->poll(b.domain, &wc, 1))
			check_imm(&wc);
	}
}

static void test_choice(void)
{
	const char *path = strchr(a.info.why, ' ');

	(void)printf("%s, %s, %s\n", a.info.provider, a.info.protocol, a.info.why);
	CHECK(strcmp(a.info.provider, "libfabric efa 2.4") == 0);
	CHECK(path && strncmp(path, " efa-direct; writes by the device", 33) == 0);
	CHECK(!a.info.emulated && !a.info.ordered && a.info.imm_depth == TFD_FI_CQ_IMMS &&
	      a.info.max_message_bytes == 1u << 30);
	CHECK(ops->wait_fd(a.domain) >= 0);
	CHECK(a.key.key <= UINT32_MAX && a.key.address == (uint64_t)(uintptr_t)a.memory);
}

struct expected {
	uint32_t version;
	const char *fabric; /* as configured */
	const char *device;
	int rc;
	const char *why; /* words that are in it */
	bool polled;
};

/* Which fabric of which version, and what is said of it. */
static void test_versions(void)
{
	static const struct expected all[] = {
		{ FI_VERSION(1, 21), "", NEAR, -ENOTSUP, NULL, false },
		{ FI_VERSION(1, 22), "", NEAR, 0, "fabric efa (", true },
		{ FI_VERSION(1, 22), "efa-direct", NEAR, -ENODEV, NULL, false },
		{ FI_VERSION(2, 2), "", NEAR, 0,
		  "fabric efa-direct; writes by the device; takes dma-bufs; no wait fd", true },
		{ FI_VERSION(2, 3), "efa-direct", NEAR, 0, "fabric efa-direct", false },
		{ FI_VERSION(2, 5), "efa", NEAR "-rdm", 0, "fabric efa-direct", false },
		{ FI_VERSION(2, 5), "", "rdmap99s1", -ENODEV, NULL, false },
		{ FI_VERSION(2, 5), "efa", "lo", -ENODEV, NULL, false },
	};
	struct tfd_rail_info info;
	struct tfd_domain *domain;

	for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
		knobs->version = all[i].version;
		CHECK(try_open(all[i].fabric, all[i].device, &info, &domain) == all[i].rc);
		if (all[i].rc)
			continue;
		CHECK(strstr(info.why, all[i].why));
		CHECK((ops->wait_fd(domain) < 0) == all[i].polled &&
		      (strstr(info.why, "no wait fd") != NULL) == all[i].polled);
		CHECK(!info.ordered);
		if (all[i].polled)
			CHECK(ops->arm(domain) == 0);
		ops->domain_close(domain);
	}
	*knobs = plain_knobs;
}

/* A device whose immediates take receive buffers has no efa-direct for us; one without RDMA write emulates, and that is told. */
static void test_devices(void)
{
	struct tfd_rail_info info;
	struct tfd_domain *domain;
	struct joined pair;

	knobs->unsolicited = 0;
	CHECK_OK(try_open("", NEAR, &info, &domain));
	CHECK(strstr(info.why, "fabric efa (") && strstr(info.why, "writes by the device"));
	CHECK(info.max_message_bytes == UINT64_MAX);
	ops->domain_close(domain);
	knobs->emulated = 1;
	CHECK_OK(try_open("", NEAR, &info, &domain));
	CHECK(strstr(info.why, "WRITES ARE EMULATED") && info.emulated);
	ops->domain_close(domain);
	*knobs = plain_knobs;
	pair_open(&pair);
	knobs->max_eps = (uint32_t)counts->eps; /* as many queue pairs as there are */
	CHECK(try_open("", NEAR, &info, &domain) == -ENOMEM);
	*knobs = plain_knobs;
	pair_close(&pair);
}

static void test_order(void)
{
	struct tfd_wr *wrs = calloc(WRITES, sizeof(*wrs));
	struct joined pair;

	CHECK(wrs);
	pair_open(&pair);
	write_all(pair.out, wrs);
	CHECK(counts->overtaken > WRITES / 10 && counts->cut > WRITES / 10 && !counts->more);
	knobs->tx_size = 3; /* a device that is always full, and one that often says so */
	write_all(pair.out, wrs);
	CHECK(counts->refused > WRITES / 2);
	knobs->tx_size = plain_knobs.tx_size;
	knobs->eagain = 70;
	write_all(pair.out, wrs);
	*knobs = plain_knobs;
	pair_close(&pair);
	free(wrs);
}

static void test_reads(void)
{
	static const uint64_t lengths[] = { 1, 4096, 65537, BYTES - 7 };
	struct joined pair;

	pair_open(&pair);
	for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
		struct tfd_post read = piece(lengths[i]);
		struct tfd_wr wr = { 0 };
		struct tfd_wc wc;

		for (uint32_t k = 0; k < BYTES; k++)
			b.memory[k] = (uint8_t)(k * 7 + i);
		memset(a.memory, 0, BYTES);
		read.read = 1;
		read.remote_address += 7;
		CHECK_OK(ops->post(pair.out, &read, &wr));
		wc = await_done(NULL);
		CHECK(wc.type == TFD_WC_SENT && wc.wr == &wr);
		CHECK(memcmp(a.memory, b.memory + 7, lengths[i]) == 0 && a.memory[lengths[i]] == 0);
	}
	pair_close(&pair);
}

static struct tfd_wc write_one(struct joined *pair, uint64_t key, struct tfd_wr *wr)
{
	struct tfd_post write = piece(64);

	write.has_imm = 1;
	write.remote_key = key;
	CHECK_OK(ops->post(pair->out, &write, wr));
	return await_done(NULL);
}

/* Each error is told of its own post, as what it is, and costs nothing beyond its connection. */
static void test_errors(void)
{
	static const struct {
		int error, prov_errno;
		bool remote_access;
	} all[] = {
		{ FI_ECONNABORTED, 13, false }, { FI_EHOSTUNREACH, 15, false }, { FI_ENORX, 10, false },
		{ FI_EINVAL, 7, true },         { FI_EINVAL, 4, false },        { FI_EOTHER, 4096, false },
	};
	struct tfd_wr wr = { 0 };
	struct joined pair, bad;
	struct tfd_wc wc;

	pair_open(&pair);
	for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
		knobs->fail_count = 1;
		knobs->fail_error = (uint32_t)all[i].error;
		knobs->fail_prov_errno = (uint32_t)all[i].prov_errno;
		wc = write_one(&pair, b.key.key, &wr);
		CHECK(wc.type == TFD_WC_ERROR && wc.wr == &wr && wc.error == all[i].error);
		CHECK(!wc.remote_access == !all[i].remote_access);
	}
	*knobs = plain_knobs;
	pair_open(&bad);
	memset(b.memory, 0xbb, 64);
	wc = write_one(&bad, b.key.key ^ 1u << 17, &wr);
	CHECK(wc.type == TFD_WC_ERROR && wc.wr == &wr && wc.remote_access && b.memory[0] == 0xbb);
	pair_close(&bad);
	wc = write_one(&pair, b.key.key, &wr);
	CHECK(wc.type == TFD_WC_SENT && wc.wr == &wr);
	pair_close(&pair);
}

/* Who is not in the far address vector may not write; a far endpoint that is gone answers with an error, too. */
static void test_peers(void)
{
	struct tfd_wr wr = { 0 };
	struct joined pair;
	struct tfd_wc wc[8];

	halves_open(&pair);
	CHECK_OK(ops->half_start(pair.out, &pair.in_address, pair.in_bytes, &error));
	wc[0] = write_one(&pair, b.key.key, &wr);
	CHECK(wc[0].type == TFD_WC_ERROR && wc[0].error == FI_ENOTCONN && !wc[0].remote_access);
	CHECK_OK(ops->half_start(pair.in, &pair.out_address, pair.out_bytes, &error));
	CHECK(write_one(&pair, b.key.key, &wr).type == TFD_WC_SENT);
	half_end(&pair.in);
	wc[0] = write_one(&pair, b.key.key, &wr);
	CHECK(wc[0].type == TFD_WC_ERROR && wc[0].wr == &wr && !wc[0].remote_access);
	pair_close(&pair);
}

/* Two halves to one far address: closing the one leaves it to the other. */
static void test_address_shared(void)
{
	struct tfd_wr wr = { 0 };
	struct joined pair, second;

	pair_open(&pair);
	halves_open(&second);
	CHECK_OK(ops->half_start(second.in, &second.out_address, second.out_bytes, &error));
	CHECK_OK(ops->half_start(second.out, &pair.in_address, pair.in_bytes, &error));
	CHECK(write_one(&second, b.key.key, &wr).type == TFD_WC_SENT);
	pair_close(&second);
	CHECK(write_one(&pair, b.key.key, &wr).type == TFD_WC_SENT);
	pair_close(&pair);
}

/* A half that is closed with posts in flight gives each of them back, once; afterwards nothing of it lands. */
static void test_close(void)
{
	enum { IN_FLIGHT = 40 };
	struct tfd_wr wrs[IN_FLIGHT] = { 0 };
	uint32_t seen[IN_FLIGHT] = { 0 };
	struct tfd_wc wc[2 * IN_FLIGHT];
	struct joined pair;
	int count;

	pair_open(&pair);
	CHECK(write_one(&pair, b.key.key, &wrs[0]).type == TFD_WC_SENT);
	for (uint32_t i = 0; i < IN_FLIGHT; i++) {
		struct tfd_post write = piece_at(i * PIECE, PIECE);

		CHECK_OK(ops->post(pair.out, &write, &wrs[i]));
		(void)ops->poll(b.domain, wc, 1);
	}
	count = half_end_telling(&pair.out, wc, 2 * IN_FLIGHT);
	for (int i = 0; i < count; i++) {
		CHECK(wc[i].wr >= wrs && wc[i].wr < wrs + IN_FLIGHT && !seen[wc[i].wr - wrs]);
		seen[wc[i].wr - wrs] = 1;
	}
	CHECK(count == IN_FLIGHT);
	half_end(&pair.in); /* what had left may land until here */
	memset(b.memory, 0xcc, BYTES);
	for (int i = 0; i < 200; i++)
		CHECK(!ops->poll(b.domain, wc, 1) && !ops->poll(a.domain, wc, 1));
	for (uint32_t i = 0; i < BYTES; i++)
		CHECK(b.memory[i] == 0xcc);
}

/* What was acknowledged and not yet polled when its half is closed is told all the same: the device would forget it. */
static void test_close_counts(void)
{
	enum { SENT = 120 };
	struct tfd_wr wrs[SENT] = { 0 };
	struct tfd_wc wc[SENT];
	uint64_t forgotten = counts->purged;
	struct joined pair;
	int sent = 0, came = 0;

	pair_open(&pair);
	for (uint32_t i = 0; i < SENT; i++) {
		struct tfd_post write = piece_at(i * 64, 64);

		write.has_imm = 1;
		write.imm = i;
		CHECK_OK(ops->post(pair.out, &write, &wrs[i]));
	}
	for (int round = 0; round < ROUNDS && sent < SENT; round++) {
		sent += ops->poll(a.domain, wc, 1); /* each but the last was acknowledged a while ago */
		if (came < SENT / 2)
			came += ops->poll(b.domain, wc, 1);
		else if (round % 8 == 0)
			came += ops->poll(b.domain, wc, 1);
	}
	CHECK(sent == SENT && came < SENT);
	came += half_end_telling(&pair.in, wc, SENT);
	CHECK(came == SENT && counts->purged == forgotten);
	pair_close(&pair);
}

/* A library that tells of posts after their half was closed, and they with it: each is told once, and nothing of other posts is. */
static void test_late(uint32_t late)
{
	enum { IN_FLIGHT = 20 };
	struct tfd_wr wrs[2][IN_FLIGHT] = { 0 };
	uint32_t flushed = 0, strange = 0, sent = 0;
	struct tfd_wc wc[4 * IN_FLIGHT];
	struct joined pair, next;
	int count;

	pair_open(&pair);
	pair_open(&next);
	knobs->late = late;
	for (uint32_t i = 0; i < IN_FLIGHT; i++) {
		struct tfd_post write = piece_at(i * PIECE, PIECE);

		CHECK_OK(ops->post(pair.out, &write, &wrs[0][i]));
	}
	ops->half_close(pair.out);
	knobs->late = 0;
	for (uint32_t i = 0; i < IN_FLIGHT;
	     i++) { /* contexts are in use again before what is late is looked at */
		struct tfd_post write = piece_at(i * PIECE, PIECE);

		CHECK_OK(ops->post(next.out, &write, &wrs[1][i]));
	}
	for (int round = 0; round < ROUNDS && (flushed < IN_FLIGHT || sent < IN_FLIGHT || !strange);
	     round++) {
		count = ops->poll(a.domain, wc, 4);
		for (int i = 0; i < count; i++) {
			if (!wc[i].wr) {
				CHECK(wc[i].type == TFD_WC_ERROR && wc[i].error == ESTALE && !wc[i].owner);
				strange++;
			} else if (wc[i].wr >= wrs[1] && wc[i].wr < wrs[1] + IN_FLIGHT) {
				CHECK(wc[i].type == TFD_WC_SENT);
				sent++;
			} else {
				CHECK(wc[i].wr == &wrs[0][flushed++]);
				CHECK(wc[i].type == TFD_WC_ERROR && wc[i].error == ECANCELED);
			}
		}
		(void)ops->poll(b.domain, &wc[0], 1);
		(void)usleep(20);
	}
	CHECK(flushed == IN_FLIGHT && sent == IN_FLIGHT && strange && strange <= IN_FLIGHT);
	ops->half_free(pair.out);
	pair.out = NULL;
	pair_close(&pair);
	pair_close(&next);
}

/* A queue that is too short loses completions, and says so of all. */
static void test_overrun(void)
{
	enum { SENT = 64 };
	struct tfd_wr wrs[SENT] = { 0 };
	bool overrun = false;
	struct joined pair;
	struct tfd_wc wc;

	side_close(&b);
	knobs->cq_size = 16;
	side_open(&b, FAR);
	knobs->cq_size = 0;
	pair_open(&pair);
	for (uint32_t i = 0; i < SENT; i++) {
		struct tfd_post write = piece_at(i * 64, 64);

		write.has_imm = 1;
		CHECK_OK(ops->post(pair.out, &write, &wrs[i]));
	}
	for (int round = 0; round < ROUNDS && !overrun; round++) {
		(void)ops->poll(a.domain, &wc, 1);
		if (round % 32 || !ops->poll(b.domain, &wc, 1))
			continue;
		overrun = wc.type == TFD_WC_ERROR;
		CHECK(!overrun || (wc.error == EOVERFLOW && !wc.wr && !wc.owner));
	}
	CHECK(overrun && counts->overruns);
	pair_close(&pair);
}

/* A far side that begins anew has another address; the old one is nobody's. */
static void test_restart(void)
{
	struct tfd_wr wr = { 0 };
	struct joined pair, again;

	pair_open(&pair);
	CHECK(write_one(&pair, b.key.key, &wr).type == TFD_WC_SENT);
	half_end(&pair.in);
	side_close(&b);
	side_open(&b, FAR);
	pair_open(&again);
	CHECK(memcmp(&pair.in_address, &again.in_address, pair.in_bytes) != 0);
	CHECK(write_one(&again, b.key.key, &wr).type == TFD_WC_SENT);
	CHECK(write_one(&pair, b.key.key, &wr).type == TFD_WC_ERROR);
	CHECK(write_one(&again, b.key.key, &wr).type == TFD_WC_SENT);
	pair_close(&pair);
	pair_close(&again);
}

/* Of a rail that is opened as told: what registering a dma-buf answers. */
static int try_dmabuf(const char *fabric, const struct tfd_dmabuf *dmabuf, struct tfd_rail_info *info)
{
	struct tfd_region_key key;
	struct tfd_domain *domain;
	struct tfd_mr *mr = NULL;
	int rc;

	memset(&error, 0, sizeof(error));
	CHECK_OK(try_open(fabric, NEAR, info, &domain));
	rc = ops->mr_open_dmabuf(domain, dmabuf, 1, &mr, &key, &error);
	if (rc == 0) {
		CHECK(key.address == dmabuf->address && counts->dmabufs == 1);
		ops->mr_close(domain, mr);
	} else {
		CHECK(!mr && strstr(error.text, "dma-buf"));
	}
	CHECK(counts->dmabufs == 0);
	ops->domain_close(domain);
	return rc;
}

/*
 * Which rails take one: those whose device does all there is to do with it. Moving bytes is native/conformance's case memory_dmabuf. What cannot
 * be is EOPNOTSUPP, so that other rails carry the region; what fails is told.
 */
static void test_dmabuf(void)
{
	struct tfd_dmabuf dmabuf = { .offset = 4096, .length = 8192, .address = 0x7000001000 };
	struct tfd_rail_info info;

	/* No driver of a GPU comes into this process with the library. */
	CHECK(strcmp(getenv("FI_HMEM"), "system") == 0);
	dmabuf.fd = memfd_create("dmabuf", MFD_CLOEXEC);
	CHECK(dmabuf.fd >= 0 && ftruncate(dmabuf.fd, 4096 + 8192) == 0);
	CHECK_OK(try_dmabuf("", &dmabuf, &info));
	CHECK(strstr(info.why, "takes dma-bufs"));
	knobs->version = FI_VERSION(2, 1); /* has fabric efa alone, which emulates when a peer cannot write */
	CHECK(try_dmabuf("", &dmabuf, &info) == -EOPNOTSUPP && !strstr(info.why, "dma-buf"));
	*knobs = plain_knobs;
	knobs->stubborn = 1; /* its processor would read short writes */
	CHECK(try_dmabuf("", &dmabuf, &info) == -EOPNOTSUPP && !strstr(info.why, "dma-buf"));
	*knobs = plain_knobs;
	knobs->dmabuf = 0;
	CHECK(try_dmabuf("", &dmabuf, &info) == -EOPNOTSUPP && strstr(error.text, "too old"));
	knobs->dmabuf = EOPNOTSUPP;
	CHECK(try_dmabuf("", &dmabuf, &info) == -EOPNOTSUPP && strstr(error.text, "too old"));
	knobs->dmabuf = ENOMEM;
	CHECK(try_dmabuf("", &dmabuf, &info) == -ENOMEM);
	*knobs = plain_knobs;
	dmabuf.length++; /* than it is long */
	CHECK(try_dmabuf("", &dmabuf, &info) == -EINVAL);
	dmabuf.length--;
	dmabuf.address++; /* elsewhere in its page */
	CHECK(try_dmabuf("", &dmabuf, &info) == -EINVAL);
	dmabuf.address--;
	(void)close(dmabuf.fd);
	dmabuf.fd = -1;
	CHECK(try_dmabuf("", &dmabuf, &info) == -EBADF);
}

static void test_bad_addresses(void)
{
	struct tfd_fi_address address;
	struct joined pair;

	halves_open(&pair);
	address = pair.in_address;
	memset(address.name, 0, 16); /* of no device */
	CHECK(ops->half_start(pair.out, &address, pair.in_bytes, &error) != 0);
	address = pair.in_address;
	address.protocol[0] ^= 1;
	CHECK(ops->half_start(pair.out, &address, pair.in_bytes, &error) == -EPROTO);
	pair_close(&pair);
}

int main(void)
{
	face_load();
	side_open(&a, NEAR);
	side_open(&b, FAR);
	test_choice();
	test_versions();
	test_devices();
	test_order();
	test_reads();
	test_errors();
	test_peers();
	test_address_shared();
	test_close();
	test_close_counts();
	test_late(1);
	test_late(2);
	test_overrun();
	test_restart();
	test_bad_addresses();
	test_dmabuf();
	side_close(&b);
	side_close(&a);
	return 0;
}
