/* SPDX-License-Identifier: Apache-2.0 */
/* Which device, port and GID the verbs provider takes, and what it says of it: on the double of libibverbs (softverbs/). */
#include "providers/verbs/address.h"
#include "verbs_soft.h"

static int try_open(struct tfd_rail_info *info, const char *rail, struct tfd_verbs_options verbs)
{
	struct tfd_group_options options = rail_options();
	struct tfd_domain *domain = NULL;
	int rc;

	options.verbs = verbs;
	memset(info, 0, sizeof(*info));
	error.text[0] = 0;
	rc = ops->domain_open(&options, rail, info, &domain, &error);
	CHECK(!rc == !error.text[0] && !rc == (domain != NULL));
	ops->domain_close(domain);
	nothing_is_left();
	return rc;
}

static void test_gids(void)
{
	struct tfd_verbs_options none = { 0 }, link_local = { .link_local = 1 },
				 given = { .gid_given = 1, .gid_index = 0 };
	struct tfd_rail_info info;

	configure("gids=v1:ll,v2:ll");
	CHECK(try_open(&info, DEVICE, none) == -EADDRNOTAVAIL);
	CHECK(strstr(error.text, "link-local") && strstr(error.text, "gid_index"));
	CHECK_OK(try_open(&info, DEVICE, link_local));
	CHECK(strstr(info.why, "GID index 1") && strstr(info.why, "link-local as allowed"));
	CHECK_OK(try_open(&info, DEVICE, given));
	CHECK(strstr(info.why, "as configured") && strcmp(info.protocol, "verbs/roce1/1") == 0);
	configure("gids=v1:v4");
	CHECK(try_open(&info, DEVICE, link_local) == -EADDRNOTAVAIL);
	configure("gids=-,-");
	CHECK(try_open(&info, DEVICE, link_local) == -EADDRNOTAVAIL && strstr(error.text, "none"));
	configure("gids=v2:ll,-,v2:ula");
	CHECK_OK(try_open(&info, DEVICE, none));
	CHECK(strstr(info.why, "GID index 2") && strstr(info.why, "none is of an IPv4"));
	configure("gids=v2:ula,v2:ll,v2:v4");
	CHECK_OK(try_open(&info, DEVICE, none));
	CHECK(strstr(info.why, "GID index 2") && strstr(info.why, "IPv4"));
}

static void test_names(void)
{
	struct tfd_verbs_options none = { 0 }, second = { .port = 2 };
	struct tfd_rail_info info;

	configure("ports=2");
	CHECK_OK(try_open(&info, DEVICE, none));
	CHECK(strstr(info.why, "port 1"));
	CHECK_OK(try_open(&info, DEVICE ":2", none));
	CHECK(strstr(info.why, "port 2"));
	CHECK_OK(try_open(&info, DEVICE, second));
	CHECK(strstr(info.why, "port 2"));
	CHECK(try_open(&info, DEVICE ":3", none) == -ENODEV);
	CHECK(try_open(&info, DEVICE ":0", none) == -ENODEV);
	CHECK(try_open(&info, DEVICE ":2x", none) == -ENODEV && strstr(error.text, DEVICE ":2x"));
	CHECK_OK(try_open(&info, "10.2.0.2", none));
	CHECK(strstr(info.why, "soft1 port 2") && strstr(info.why, "10.2.0.2"));
	CHECK(try_open(&info, "10.3.0.2", none) == -ENODEV);
	SOFT(softverbs_port)(DEVICE, 1, 0);
	CHECK_OK(try_open(&info, DEVICE, none));
	CHECK(strstr(info.why, "port 2"));
	SOFT(softverbs_port)(DEVICE, 1, 1);
}

/* By its LID, and nothing of a GID. */
static void test_infiniband(void)
{
	struct joined pair;

	configure("link=ib; gids=ib:ll");
	side_open_at(&a, DEVICE);
	side_open_at(&b, "soft1");
	CHECK(strcmp(a.info.protocol, "verbs/ib/1") == 0);
	pair_open(&pair);
	write_passes(&pair, 3);
	pair_close(&pair);
	side_close(&a);
	side_close(&b);
	nothing_is_left();
}

/* Ports that have no LID, as virtual functions may, say that packets need a GRH. */
static void test_infiniband_global(void)
{
	struct tfd_verbs_address address;
	struct joined pair;

	configure("link=ib; gids=ib:ll; grh=1");
	side_open_at(&a, DEVICE);
	side_open_at(&b, "soft1");
	pair_open(&pair);
	memcpy(&address, pair.out_address, sizeof(address));
	CHECK(!address.lid);
	write_passes(&pair, 4);
	pair_close(&pair);
	side_close(&a);
	side_close(&b);
	nothing_is_left();
}

/* A full member of the partition before a limited one; without either, if none was asked for, whatever there is. */
static void test_pkeys(void)
{
	struct tfd_verbs_options none = { 0 }, one = { .pkey = 1 }, two = { .pkey = 2 };
	struct tfd_rail_info info;

	configure("");
	SOFT(softverbs_pkey)(DEVICE, 1, 0, 0x7fff);
	SOFT(softverbs_pkey)(DEVICE, 1, 1, 0x8001);
	SOFT(softverbs_pkey)(DEVICE, 1, 2, 0xffff);
	CHECK_OK(try_open(&info, DEVICE, none));
	CHECK(strstr(info.why, "pkey 0xffff"));
	CHECK_OK(try_open(&info, DEVICE, one));
	CHECK(strstr(info.why, "pkey 0x8001"));
	CHECK(try_open(&info, DEVICE, two) == -ENOENT);
	SOFT(softverbs_pkey)(DEVICE, 1, 2, 0);
	CHECK_OK(try_open(&info, DEVICE, none));
	CHECK(strstr(info.why, "pkey 0x7fff"));
	SOFT(softverbs_pkey)(DEVICE, 1, 0, 0);
	CHECK_OK(try_open(&info, DEVICE, none));
	CHECK(strstr(info.why, "pkey 0x8001"));
	SOFT(softverbs_pkey)(DEVICE, 1, 1, 0);
	CHECK(try_open(&info, DEVICE, none) == -ENOENT);
}

static void passes(void)
{
	struct joined pair;

	pair_open(&pair);
	write_passes(&pair, 5);
	pair_close(&pair);
}

/* Its subnet manager finds the port after the rail was opened. */
static void test_infiniband_late(void)
{
	configure("link=ib; gids=ib:ll");
	SOFT(softverbs_port)(DEVICE, 1, 0);
	SOFT(softverbs_given)(DEVICE, 1, 0, IBV_MTU_256);
	side_open_at(&a, DEVICE);
	side_open_at(&b, "soft1");
	CHECK(ops->rail_state(a.domain) == TFD_RAIL_DOWN);
	SOFT(softverbs_given)(DEVICE, 1, 77, IBV_MTU_4096);
	SOFT(softverbs_port)(DEVICE, 1, 1);
	await_state(&a, TFD_RAIL_UP);
	passes();
	side_close(&a);
	side_close(&b);
}

/* A subnet manager changes the prefix that is a part of the GID whose index was told, and LIDs with it. */
static void test_infiniband_prefix(void)
{
	static const struct tfd_verbs_options by_gid = { .gid_given = 1, .gid_index = 0 };
	uint8_t address[TFD_ADDRESS_MAX];
	size_t bytes = sizeof(address);
	struct tfd_half *none;
	struct joined pair;
	struct tfd_post post;
	struct tfd_wr wr = { 0 };
	struct tfd_wc wc;

	configure("link=ib; gids=ib:ll; hurry=100");
	side_open_with(&a, DEVICE, by_gid);
	side_open_with(&b, "soft1", by_gid);
	CHECK(ops->rail_state(a.domain) == TFD_RAIL_UP);
	pair_open(&pair);
	write_passes(&pair, 1);
	CHECK(SOFT(softverbs_gid)(DEVICE, 1, 0, "-") == 0);
	await_state(&a, TFD_RAIL_DOWN);
	CHECK(ops->half_open(a.domain, 1, NULL, &none, address, &bytes, &error) == -ENOENT);
	CHECK(strstr(error.text, "subnet manager"));
	CHECK(SOFT(softverbs_gid)(DEVICE, 1, 0, "ib:ula") == 0);
	await_state(&a, TFD_RAIL_UP);
	post = piece_of(&a, &b, 8);
	CHECK_OK(ops->post(pair.out, &post, &wr)); /* by the GID that was */
	wc = next_of(&a);
	CHECK(wc.type == TFD_WC_ERROR && wc.wr == &wr && wc.error == ETIMEDOUT);
	pair_close(&pair);
	passes();
	SOFT(softverbs_given)(DEVICE, 1, 90, IBV_MTU_4096);
	SOFT(softverbs_port_event)(DEVICE, 1, IBV_EVENT_LID_CHANGE);
	passes();
	side_close(&a);
	side_close(&b);
	nothing_is_left();
}

/* What tells of it is one event of several. */
static void test_infiniband_events(void)
{
	static const int events[] = { IBV_EVENT_GID_CHANGE, IBV_EVENT_LID_CHANGE, IBV_EVENT_SM_CHANGE,
	                              IBV_EVENT_CLIENT_REREGISTER, IBV_EVENT_PKEY_CHANGE };

	configure("link=ib; gids=ib:ll");
	side_open_at(&a, DEVICE);
	for (size_t i = 0; i < sizeof(events) / sizeof(events[0]); i++) {
		tfd_store_relaxed(&a.domain->state, (uint32_t)TFD_RAIL_DOWN);
		SOFT(softverbs_port_event)(DEVICE, 1, events[i]);
		await_state(&a, TFD_RAIL_UP);
	}
	side_close(&a);
}

static enum ibv_mtu path_mtu(const struct tfd_half *half)
{
	struct ibv_qp_init_attr init;
	struct ibv_qp_attr attributes;

	CHECK(SOFT(ibv_query_qp)(half->queues[0].qp, &attributes, IBV_QP_PATH_MTU, &init) == 0);
	return attributes.path_mtu;
}

/* An interface's MTU is changed: what a half has told, it goes by; the next one tells what there is then. */
static void test_mtu(void)
{
	struct tfd_verbs_address address;
	struct joined pair, next;

	configure("");
	side_open_at(&a, DEVICE);
	side_open_with(&b, "soft1", (struct tfd_verbs_options){ .mtu = 2048 });
	SOFT(softverbs_given)(DEVICE, 1, 0, IBV_MTU_1024);
	halves_open(&pair);
	memcpy(&address, pair.out_address, sizeof(address));
	CHECK(address.mtu == IBV_MTU_1024);
	memcpy(&address, pair.in_address, sizeof(address));
	CHECK(address.mtu == IBV_MTU_2048);
	SOFT(softverbs_given)(DEVICE, 1, 0, IBV_MTU_4096);
	halves_open(&next);
	memcpy(&address, next.out_address, sizeof(address));
	CHECK(address.mtu == IBV_MTU_4096);
	join(&pair);
	CHECK(path_mtu(pair.out) == IBV_MTU_1024 && path_mtu(pair.in) == IBV_MTU_1024);
	write_passes(&pair, 6);
	pair_close(&pair);
	pair_close(&next);
	side_close(&a);
	side_close(&b);
}

/* Two entries alike, as of an interface and a VLAN of it: it stays with its own for as long as that is there. */
static void test_twin_gids(void)
{
	struct tfd_verbs_options first = { .gid_given = 1, .gid_index = 0 };
	uint64_t until = tfd_now_ns() + PATIENCE_NS;

	configure("gids=v2:v4,v2:v4");
	side_open_with(&a, DEVICE, first);
	side_open_at(&b, "soft1");
	SOFT(softverbs_port)(DEVICE, 1, 0);
	await_state(&a, TFD_RAIL_DOWN); /* events come in their order */
	CHECK(tfd_load_relaxed(&a.domain->port.gid_index) == 0);
	CHECK(SOFT(softverbs_gid)(DEVICE, 1, 0, "-") == 0);
	while (tfd_load_relaxed(&a.domain->port.gid_index) != 1) {
		CHECK(tfd_now_ns() < until);
		(void)usleep(100);
	}
	CHECK(SOFT(softverbs_gid)(DEVICE, 1, 0, "v2:v4") == 0);
	SOFT(softverbs_port)(DEVICE, 1, 1);
	await_state(&a, TFD_RAIL_UP);
	CHECK(tfd_load_relaxed(&a.domain->port.gid_index) == 1);
	passes();
	side_close(&a);
	side_close(&b);
}

static struct ibv_qp_attr queue_of(const struct tfd_half *half, uint32_t traffic)
{
	struct ibv_qp_init_attr init;
	struct ibv_qp_attr attributes;

	CHECK(SOFT(ibv_query_qp)(half->queues[traffic].qp, &attributes, IBV_QP_AV, &init) == 0);
	return attributes;
}

/* What is configured is what the queue pairs get: bulk has a service level of its own, the other two share one. */
static void test_configured(void)
{
	static const struct tfd_verbs_options options = { .gid_given = 1,
	                                                  .gid_index = 2,
	                                                  .pkey = 0x8001,
	                                                  .service_level = 5,
	                                                  .bulk_service_level = 3,
	                                                  .traffic_class = 106,
	                                                  .timeout = 9,
	                                                  .retries = 4 };
	struct tfd_verbs_address told;
	struct joined pair;

	configure("gids=v1:ll,v2:ll,v2:ula,v2:v4");
	SOFT(softverbs_pkey)(DEVICE, 1, 3, 0x8001);
	side_open_with(&a, DEVICE, options);
	side_open_at(&b, "soft1");
	halves_open(&pair);
	memcpy(&told, pair.in_address, sizeof(told));
	told.reads = 3; /* of a device that answers fewer than ours asks for */
	memcpy(pair.in_address, &told, sizeof(told));
	join(&pair);
	for (uint32_t i = 0; i < TFD_VERBS_CHANNELS; i++) {
		struct ibv_qp_attr near = queue_of(pair.out, i), far = queue_of(pair.in, i);

		CHECK(near.ah_attr.sl == (i == TFD_TRAFFIC_BULK ? 3 : 5) && far.ah_attr.sl == 0);
		CHECK(near.ah_attr.grh.traffic_class == 106 && near.ah_attr.grh.sgid_index == 2);
		CHECK(near.pkey_index == 3 && near.timeout == 9 && near.retry_cnt == 4);
		CHECK(far.ah_attr.grh.traffic_class == 0 && far.ah_attr.grh.sgid_index == 3);
		CHECK(far.pkey_index == 0 && far.timeout == 14 && far.retry_cnt == 7);
		CHECK(near.rnr_retry < 7 && far.rnr_retry < 7); /* 7: for ever */
		CHECK(near.max_rd_atomic == 3 && far.max_rd_atomic == 16 && near.max_dest_rd_atomic == 16);
		CHECK(near.sq_psn == far.rq_psn && far.sq_psn == near.rq_psn);
	}
	pair_close(&pair);
	side_close(&a);
	side_close(&b);
	nothing_is_left();
}

/* Each queue pair begins with a packet of its own choice: what was told for an earlier one leads nowhere. */
static void test_replayed(void)
{
	struct tfd_verbs_address first, second;
	struct joined old, pair;
	struct tfd_post post;
	struct tfd_wr wr = { 0 };
	struct tfd_wc wc;

	configure("hurry=100");
	side_open_at(&a, DEVICE);
	side_open_at(&b, "soft1");
	pair_open(&old);
	halves_open(&pair);
	memcpy(&first, old.out_address, sizeof(first));
	memcpy(&second, pair.out_address, sizeof(second));
	for (uint32_t i = 0; i < TFD_VERBS_CHANNELS; i++)
		CHECK(first.psns[i] != second.psns[i] && first.psns[i] != first.psns[(i + 1) % 3]);
	/* The queue pairs that there are, by packets of others'. */
	memcpy(second.psns, first.psns, sizeof(second.psns));
	memcpy(pair.out_address, &second, sizeof(second));
	join(&pair);
	memset(a.memory, 1, 64);
	memset(b.memory, 0, 64);
	post = piece(64);
	post.has_imm = 1;
	CHECK_OK(ops->post(pair.out, &post, &wr));
	wc = next_of(&a);
	CHECK(wc.type == TFD_WC_ERROR && wc.wr == &wr && !b.memory[0] && ops->poll(b.domain, &wc, 1) == 0);
	pair_close(&pair);
	write_passes(&old, 7);
	pair_close(&old);
	side_close(&a);
	side_close(&b);
	nothing_is_left();
}

/* RoCE has eight, which are the priorities of Ethernet: another would be one of these in the end. */
static void test_service_levels(void)
{
	struct tfd_rail_info info;

	configure("");
	CHECK_OK(try_open(&info, DEVICE, (struct tfd_verbs_options){ .service_level = 7 }));
	CHECK(try_open(&info, DEVICE, (struct tfd_verbs_options){ .service_level = 8 }) == -EINVAL);
	CHECK(strstr(error.text, "service_level is 8") && strstr(error.text, "0 to 7"));
	CHECK(try_open(&info, DEVICE, (struct tfd_verbs_options){ .bulk_service_level = 15 }) == -EINVAL);
	CHECK(strstr(error.text, "bulk_service_level is 15"));
	configure("link=ib; gids=ib:ll");
	CHECK_OK(try_open(&info, DEVICE, (struct tfd_verbs_options){ .bulk_service_level = 15 }));
}

/* Payload may pass payload on its way to memory; both kinds of registration ask for that. */
static void test_relaxed(void)
{
	struct tfd_region_key key;
	struct tfd_mr *mr;
	uint64_t before;

	configure("");
	side_open_at(&a, DEVICE);
	before = counts().relaxed_mrs;
	CHECK_OK(ops->mr_open(a.domain, a.memory, BYTES, 1, &mr, &key, &error));
	ops->mr_close(a.domain, mr);
	CHECK_OK(ops->mr_open(a.domain, a.memory, BYTES, 0, &mr, &key, &error));
	ops->mr_close(a.domain, mr);
	CHECK(counts().relaxed_mrs == before + 2);
	side_close(&a);
}

static void test_too_small(void)
{
	struct tfd_rail_info info;

	configure("max_srq_wr=32");
	CHECK(try_open(&info, DEVICE, (struct tfd_verbs_options){ 0 }) == -ENOTSUP);
	CHECK(strstr(error.text, "shared receive queue"));
}

/* Of children nothing is taken from under the device; where the library sees to that, huge pages need a setting. */
static void test_children(void)
{
	struct tfd_region_key key;
	struct tfd_mr *mr = NULL;

	configure("");
	side_open_at(&a, DEVICE);
	CHECK(SOFT(ibv_is_fork_initialized)() == IBV_FORK_ENABLED);
	SOFT(softverbs_fail)("ibv_reg_mr_iova2", 0, EINVAL);
	CHECK(ops->mr_open(a.domain, a.memory, BYTES, 1, &mr, &key, &error) == -EINVAL && !mr);
	CHECK(strstr(error.text, "RDMAV_HUGEPAGES_SAFE"));
	side_close(&a);
	nothing_is_left();
}

int main(void)
{
	(void)unsetenv("TFD_TEST_LIBRARY");
	(void)unsetenv("TFD_TEST_RAIL");
	test_gids();
	test_names();
	test_pkeys();
	test_infiniband();
	test_infiniband_global();
	test_infiniband_late();
	test_infiniband_prefix();
	test_infiniband_events();
	test_mtu();
	test_twin_gids();
	test_configured();
	test_replayed();
	test_service_levels();
	test_relaxed();
	test_too_small();
	test_children();
	return 0;
}
