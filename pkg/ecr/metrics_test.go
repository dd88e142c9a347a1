package ecr

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
)

func TestMetrics(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		keys := Grant{frankfurt, customerKeys()}
		w.tokens.Use("a", want(mine), want(keys))
		w.after(time.Second)
		begun := w.begun.Unix()
		w.away(errors.New("x"))
		w.after(7 * time.Hour)
		failures := w.tokens.grants[mine.ID()].failures
		require.NotZero(t, failures)
		w.tokens.Use("a", want(mine))
		require.NoError(t, testutil.CollectAndCompare(w.tokens, strings.NewReader(fmt.Sprintf(`
# HELP imps_ecr_failures_in_a_row How often ECR has failed to give a token since the last success; of several grants with the same labels the most.
# TYPE imps_ecr_failures_in_a_row gauge
imps_ecr_failures_in_a_row{identity="ambient",registry="eu-central-1"} %d
# HELP imps_ecr_last_success_timestamp_seconds When ECR last gave a token to this process, by the clock of AWS; of several grants with the same labels the earliest.
# TYPE imps_ecr_last_success_timestamp_seconds gauge
imps_ecr_last_success_timestamp_seconds{identity="ambient",registry="eu-central-1"} %d
# HELP imps_ecr_token_expiry_timestamp_seconds When the token expires that is in use, by the clock of AWS; of several grants with the same labels the first.
# TYPE imps_ecr_token_expiry_timestamp_seconds gauge
imps_ecr_token_expiry_timestamp_seconds{identity="ambient",registry="eu-central-1"} %d
`, failures, begun, begun+12*3600)), "imps_ecr_failures_in_a_row", "imps_ecr_last_success_timestamp_seconds", "imps_ecr_token_expiry_timestamp_seconds"))
		require.InDelta(t, failures, testutil.ToFloat64(w.tokens.mints.WithLabelValues("eu-central-1", "ambient", resultFailed)), 0)
		require.InDelta(t, 1, testutil.ToFloat64(w.tokens.mints.WithLabelValues("eu-central-1", "access key", resultOK)), 0)
		w.away(ErrWait)
		w.after(time.Hour)
		require.NotZero(t, testutil.ToFloat64(w.tokens.mints.WithLabelValues("eu-central-1", "ambient", resultRefused)))
		problems, err := testutil.CollectAndLint(w.tokens)
		require.NoError(t, err)
		require.Empty(t, problems)
	})
}
