/* SPDX-License-Identifier: Apache-2.0 */
/* Rails. */
#include "cases.h"
#include "conformance.h"

#define CYCLES 20

static bool any_name_is_a_rail(void)
{
	if (settings.ops->path_id == TFD_PATH_STAGED)
		return strncmp(settings.options.fabric, "sim", 3) == 0 ||
		       strcmp(settings.options.fabric, "local") == 0;
	return settings.ops->path_id == TFD_PATH_LOCAL || settings.ops->path_id == TFD_PATH_SIM;
}

static void open_refused(const char *name)
{
	struct tfd_rail_info info = { 0 };
	struct tfd_domain *domain = NULL;
	int rc;

	memset(&error, 0, sizeof(error));
	rc = settings.ops->domain_open(&settings.options, name, &info, &domain, &error);
	if (rc == 0)
		FAIL("a rail \"%s\" was opened", name);
	CHECK(!domain); /* untouched */
	if (rc != -ENODEV && rc != -ENOTSUP)
		FAIL("rail \"%s\": %s instead of ENODEV", name, strerror(-rc));
	if (!strstr(error.text, name))
		FAIL("rail \"%s\" is not named by \"%s\"", name, error.text);
}

void case_open_unknown(void)
{
	char longest[TFD_NAME_MAX];

	if (any_name_is_a_rail())
		outcome_skip("any name is a rail of %s", settings.ops->name);
	memset(longest, 'x', sizeof(longest) - 1);
	longest[sizeof(longest) - 1] = 0;
	open_refused("no-such-rail0");
	open_refused("%s%n");
	open_refused("../../etc");
	open_refused(longest);
	outcome_remark("%s", error.text);
}

static bool is_text(const char *text, size_t bytes, bool may_be_empty)
{
	return memchr(text, 0, bytes) && (may_be_empty || text[0]);
}

void case_open_info(void)
{
	struct rig *rig = rig_open();
	const struct tfd_rail_info *info = &rig->sides[0].info;

	CHECK(is_text(info->name, sizeof(info->name), false));
	CHECK(is_text(info->provider, sizeof(info->provider), false));
	CHECK(is_text(info->protocol, sizeof(info->protocol), false));
	CHECK(is_text(info->why, sizeof(info->why), true));
	CHECK(info->max_message_bytes >= TFD_REQUEST_BYTES);
	CHECK(info->channels <= 1 || info->channels == TFD_TRAFFIC_MESSAGE + 1);
	CHECK(!rig->ops->rail_state || rig->ops->rail_state(rig->sides[0].domain) == TFD_RAIL_UP);
	CHECK(info->ordered || info->channels <= 1); /* a channel is an order */
	CHECK(strcmp(info->protocol, rig->sides[1].info.protocol) == 0);
	CHECK(info->ordered == rig->sides[1].info.ordered);
	CHECK(info->channels == rig->sides[1].info.channels);
	outcome_remark("%s, %s: messages up to %llu, %u parts, %s, %u channels, imm_depth %u%s%s",
	               info->provider, info->protocol, (unsigned long long)info->max_message_bytes,
	               info->max_parts, info->ordered ? "ordered" : "unordered", info->channels,
	               info->imm_depth, info->why[0] ? "; " : "", info->why);
	rig_close(rig);
}

void case_open_cycles(void)
{
	uint32_t fds = 0, threads = 0;

	for (uint32_t i = 0; i < load(CYCLES); i++) {
		struct rig *rig = rig_open();

		rig_settle(rig);
		rig_close(rig);
		if (i) { /* the first loads the library, which keeps what it has */
			CHECK(count_fds() <= fds);
			CHECK(count_threads() <= threads);
		}
		fds = count_fds();
		threads = count_threads();
	}
	rig_close(rig_open());
}
