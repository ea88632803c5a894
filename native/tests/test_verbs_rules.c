/* SPDX-License-Identifier: Apache-2.0 */
/* What the verbs provider decides without a device: which GID, and which addresses of far halves it refuses. */
#include <arpa/inet.h>

#include "core_fixture.h"
#include "providers/verbs/address.h"

static struct tfd_gid gid(uint32_t index, uint32_t type, const char *text, const char *netdev)
{
	struct tfd_gid made = { .index = index, .type = type };

	if (inet_pton(AF_INET, text, made.raw + 12) == 1)
		made.raw[10] = made.raw[11] = 0xff;
	else
		CHECK(inet_pton(AF_INET6, text, made.raw) == 1);
	(void)strcpy(made.netdev, netdev);
	return made;
}

/* As a mlx5 port shows itself: each address as v1 and as v2, the link-local ones first. */
static void test_order(void)
{
	const struct tfd_gid table[] = {
		gid(0, TFD_GID_ROCE_V1, "fe80::1", "eth0"),
		gid(1, TFD_GID_ROCE_V2, "fe80::1", "eth0"),
		gid(2, TFD_GID_ROCE_V1, "2001:db8::7", "eth0"),
		gid(3, TFD_GID_ROCE_V2, "2001:db8::7", "eth0"),
		gid(4, TFD_GID_ROCE_V1, "10.9.0.1", "eth0"),
		gid(5, TFD_GID_ROCE_V2, "10.9.0.1", "eth0"),
		gid(6, TFD_GID_ROCE_V2, "10.9.0.2", "eth0.7"),
		gid(255, TFD_GID_ROCE_V2, "10.9.0.3", "eth0.8"),
		gid(256, TFD_GID_ROCE_V2, "10.9.0.4", "eth0.9"),
	};

	CHECK(tfd_gid_choose(table, 7, false, NULL) == &table[5]);
	CHECK(tfd_gid_choose(table, 7, true, NULL) == &table[5]);
	CHECK(tfd_gid_choose(table, 5, false, NULL) == &table[3]); /* without the IPv4 ones of v2 */
	CHECK(tfd_gid_choose(table, 3, false, NULL) == NULL);
	CHECK(tfd_gid_choose(table, 3, true, NULL) == &table[1]);
	CHECK(tfd_gid_choose(table, 1, true, NULL) == NULL); /* never v1 */
	CHECK(tfd_gid_choose(table, 0, true, NULL) == NULL);
	CHECK(tfd_gid_choose(table, 7, false, "eth0.7") == &table[6]);
	CHECK(tfd_gid_choose(table, 7, false, "10.9.0.2") == &table[6]);
	CHECK(tfd_gid_choose(table, 7, false, "2001:db8::7") == &table[3]);
	CHECK(tfd_gid_choose(table, 7, false, "eth1") == NULL);
	CHECK(tfd_gid_choose(table, 7, false, "fe80::1") == NULL); /* named, and still not allowed */
	CHECK(tfd_gid_choose(table, 7, true, "fe80::1") == &table[1]);
	CHECK(tfd_gid_choose(table, 9, false, "eth0.8") == &table[7]);
	CHECK(tfd_gid_choose(table, 9, true, "eth0.9") == NULL); /* its index does not fit into a path */
}

static void test_ranks(void)
{
	const struct {
		const char *text;
		enum tfd_gid_rank rank;
	} cases[] = {
		{ "10.0.0.1", TFD_GID_IPV4 },
		{ "192.168.1.1", TFD_GID_IPV4 },
		{ "169.254.3.4", TFD_GID_LINK_LOCAL },
		{ "169.253.3.4", TFD_GID_IPV4 },
		{ "127.0.0.1", TFD_GID_UNUSABLE },
		{ "0.0.0.0", TFD_GID_UNUSABLE },
		{ "224.0.0.1", TFD_GID_UNUSABLE },
		{ "255.255.255.255", TFD_GID_UNUSABLE },
		{ "::", TFD_GID_UNUSABLE },
		{ "::1", TFD_GID_UNUSABLE },
		{ "ff02::1", TFD_GID_UNUSABLE },
		{ "fe80::1", TFD_GID_LINK_LOCAL },
		{ "febf::1", TFD_GID_LINK_LOCAL },
		{ "fec0::1", TFD_GID_IPV6 },
		{ "fd00::1", TFD_GID_IPV6 },
		{ "2001:db8::1", TFD_GID_IPV6 },
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct tfd_gid v2 = gid(0, TFD_GID_ROCE_V2, cases[i].text, "");
		struct tfd_gid v1 = gid(0, TFD_GID_ROCE_V1, cases[i].text, "");

		if (tfd_gid_rank(&v2) != cases[i].rank)
			(void)fprintf(stderr, "%s\n", cases[i].text);
		CHECK(tfd_gid_rank(&v2) == cases[i].rank);
		CHECK(tfd_gid_rank(&v1) == TFD_GID_UNUSABLE);
	}
}

static void test_text(void)
{
	struct tfd_gid table[600];
	char one[TFD_GID_TEXT], many[160];

	table[0] = gid(0, TFD_GID_ROCE_V2, "fe80::a:b", "");
	table[1] = gid(1, TFD_GID_ROCE_V2, "10.9.0.1", "");
	tfd_gid_text(&table[0], one);
	CHECK(strcmp(one, "fe80::a:b (RoCE v2, link-local)") == 0);
	tfd_gid_text(&table[1], one);
	CHECK(strcmp(one, "10.9.0.1 (RoCE v2)") == 0);
	tfd_gids_text(table, 2, &table[1], many, sizeof(many));
	CHECK(strcmp(many, "0: fe80::a:b (RoCE v2, link-local)") == 0);
	tfd_gids_text(table, 1, &table[0], many, sizeof(many));
	CHECK(many[0] == 0);
	for (uint32_t i = 0; i < 600; i++)
		table[i] = gid(i, TFD_GID_ROCE_V2, "fe80:1111:2222:3333:4444:5555:6666:7777", "");
	tfd_gids_text(table, 600, NULL, many, sizeof(many));
	CHECK(strstr(many, "more") && strlen(many) < sizeof(many));
}

/* ---- addresses ---- */

static const struct tfd_verbs_port ethernet = { .link_layer = IBV_LINK_LAYER_ETHERNET, .global = true };
static const struct tfd_verbs_port infiniband = { .link_layer = IBV_LINK_LAYER_INFINIBAND };

static struct tfd_verbs_address good(void)
{
	return (struct tfd_verbs_address){ .magic = TFD_VERBS_MAGIC,
	                                   .link_layer = IBV_LINK_LAYER_ETHERNET,
	                                   .mtu = IBV_MTU_1024,
	                                   .reads = 16,
	                                   .numbers = { 2, 0xffffff, 77 },
	                                   .psns = { 0, 0xffffff, 1 },
	                                   .gid = { [10] = 0xff, 0xff, 10, 9, 0, 1 } };
}

static void refused(const struct tfd_verbs_port *port, const void *bytes, size_t count)
{
	struct tfd_verbs_address out = { .magic = 5 };

	error.text[0] = 0;
	CHECK(tfd_verbs_address_check(port, bytes, count, &out, &error) == -EPROTO);
	CHECK(error.text[0] && out.magic == 5);
}

#define REFUSED(port, change)                          \
	do {                                           \
		struct tfd_verbs_address bad = good(); \
		change;                                \
		refused(&(port), &bad, sizeof(bad));   \
	} while (0)

static void test_addresses(void)
{
	struct tfd_verbs_address address = good(), out;
	uint8_t longer[sizeof(address) + 1] = { 0 };

	CHECK_OK(tfd_verbs_address_check(&ethernet, &address, sizeof(address), &out, &error));
	CHECK(memcmp(&out, &address, sizeof(out)) == 0);
	memcpy(longer, &address, sizeof(address));
	for (size_t count = 0; count < sizeof(address); count++)
		refused(&ethernet, &address, count);
	refused(&ethernet, longer, sizeof(longer));
	REFUSED(ethernet, bad.magic++);
	REFUSED(ethernet, bad._pad = 1);
	REFUSED(ethernet, bad._pad2 = 1);
	REFUSED(ethernet, bad.link_layer = IBV_LINK_LAYER_INFINIBAND);
	REFUSED(ethernet, bad.link_layer = 77);
	REFUSED(infiniband, (void)bad);
	REFUSED(ethernet, bad.mtu = 0);
	REFUSED(ethernet, bad.mtu = 6);
	REFUSED(ethernet, bad.reads = 0);
	REFUSED(ethernet, bad.numbers[1] = 0);
	REFUSED(ethernet, bad.numbers[1] = 1);
	REFUSED(ethernet, bad.numbers[2] = 1u << 24);
	REFUSED(ethernet, bad.numbers[2] = bad.numbers[0]);
	REFUSED(ethernet, bad.psns[0] = 1u << 24);
	REFUSED(ethernet, memset(bad.gid, 0, 16));
	REFUSED(ethernet, bad.gid[0] = 0xff);
}

static void test_infiniband(void)
{
	struct tfd_verbs_port global = infiniband;
	struct tfd_verbs_address address = good(), out;

	address.link_layer = IBV_LINK_LAYER_INFINIBAND;
	refused(&infiniband, &address, sizeof(address)); /* no LID */
	address.lid = 3;
	memset(address.gid, 0, sizeof(address.gid));
	CHECK_OK(tfd_verbs_address_check(&infiniband, &address, sizeof(address), &out, &error));
	global.global = true;
	refused(&global, &address, sizeof(address)); /* with a GRH it has to have a GID */
}

/* Whatever bytes come: refused, or every field is within its bounds. */
static void test_random_bytes(void)
{
	uint32_t state = 1, taken = 0;

	for (uint32_t i = 0; i < 200000; i++) {
		struct tfd_verbs_address address = good(), out;

		for (uint32_t j = 0; j < 2; j++) {
			state = state * 1664525u + 1013904223u;
			((uint8_t *)&address)[(state >> 16) % sizeof(address)] = (uint8_t)(state >> 8);
		}
		if (tfd_verbs_address_check(&ethernet, &address, sizeof(address), &out, &error) != 0)
			continue;
		taken++;
		CHECK(out.mtu >= IBV_MTU_256 && out.mtu <= IBV_MTU_4096);
		for (uint32_t j = 0; j < TFD_VERBS_CHANNELS; j++)
			CHECK(out.numbers[j] >> 24 == 0 && out.psns[j] >> 24 == 0 && out.numbers[j] > 1);
	}
	CHECK(taken > 0 && taken < 200000);
}

int main(void)
{
	test_order();
	test_ranks();
	test_text();
	test_addresses();
	test_infiniband();
	test_random_bytes();
	return 0;
}
