package sync

import (
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"k8s.io/apimachinery/pkg/types"
)

func TestReportIsEncodedAndDecoded(t *testing.T) {
	t.Parallel()
	report := func() Report {
		return Report{Node: "n1", FormatVersions: []int{1, 2}, Demand: map[string][]types.UID{
			"b": {uidB, uidA}, "a": {uidA}, "c": {uidA, uidB}, "d": {uidB}, "e": {uidA},
		}}
	}
	data, err := report().Encode()
	require.NoError(t, err)
	require.Equal(t, map[string]string{ReportKey: `{"node":"n1","formatVersions":[1,2],"demand":{"a":["` + string(uidA) + `"],` +
		`"b":["` + string(uidA) + `","` + string(uidB) + `"],"c":["` + string(uidA) + `","` + string(uidB) + `"],"d":["` + string(uidB) + `"],"e":["` + string(uidA) + `"]}}`}, data)
	for range 10 { // neither maps nor the order of discovery have an order
		again, err := report().Encode()
		require.NoError(t, err)
		require.Equal(t, data, again)
	}
	got, err := DecodeReport(data)
	require.NoError(t, err)
	want := report()
	slices.Sort(want.Demand["b"])
	require.Equal(t, want, got)
}

func TestAReportWithoutDemandIsTheSameWithAnEmptyOne(t *testing.T) {
	t.Parallel()
	without, err := Report{Node: "n1", FormatVersions: []int{1}}.Encode()
	require.NoError(t, err)
	with, err := Report{Node: "n1", FormatVersions: []int{1}, Demand: map[string][]types.UID{}}.Encode()
	require.NoError(t, err)
	require.Equal(t, without, with)
	require.Equal(t, `{"node":"n1","formatVersions":[1]}`, with[ReportKey])
}

func TestAReportOfANewerAgentIsRead(t *testing.T) {
	t.Parallel()
	got, err := DecodeReport(map[string]string{ReportKey: `{"node":"n1","formatVersions":[2],"demand":{"a":["u"]},"newer":[{"pod":"x"}]}`, "other": "x"})
	require.NoError(t, err)
	require.Equal(t, Report{Node: "n1", FormatVersions: []int{2}, Demand: map[string][]types.UID{"a": {"u"}}}, got)
}

func TestWhatIsNoReportIsRefused(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"nothing":                   ``,
		"no JSON":                   `{"node":"n1"`,
		"no object":                 `["n1"]`,
		"no node":                   `{"formatVersions":[1]}`,
		"null":                      `null`,
		"another type":              `{"node":1}`,
		"demand of a list":          `{"node":"n1","demand":["a"]}`,
		"demand of strings":         `{"node":"n1","demand":{"a":"u"}}`,
		"two reports":               `{"node":"n1"}{"node":"n2"}`,
		"more than a node can have": `{"node":"` + strings.Repeat("n", reportMaxBytes) + `"}`,
	} {
		got, err := DecodeReport(map[string]string{ReportKey: text})
		require.ErrorContains(t, err, "node report", name)
		require.Zero(t, got, name)
		require.Less(t, len(err.Error()), 300, name)
	}
	_, err := DecodeReport(nil)
	require.Error(t, err)
}

func FuzzDecodeReport(f *testing.F) {
	for _, seed := range []string{
		``, `null`, `{}`, `{"node":"n1"}`, `{"node":"n1","formatVersions":null,"demand":null}`,
		`{"node":"n1","formatVersions":[1],"demand":{"a":["u2","u1","u1"],"":[],"b":null}}`, `{"Node":"x","node":"\ud800"}`,
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		r, err := DecodeReport(map[string]string{ReportKey: text})
		if err != nil {
			require.Zero(t, r)
			return
		}
		require.NotEmpty(t, r.Node)
		encoded, err := r.Encode()
		require.NoError(t, err)
		again, err := DecodeReport(encoded)
		require.NoError(t, err)
		twice, err := again.Encode()
		require.NoError(t, err)
		require.Equal(t, encoded, twice)
		require.Equal(t, r.Node, again.Node)
		require.Len(t, again.Demand, len(r.Demand))
	})
}

func TestNamesOfOwnObjects(t *testing.T) {
	t.Parallel()
	require.Equal(t, "imps-rendered-u", RenderedName("u"))
	require.Equal(t, "imps-state-u", StateName("u"))
	require.Equal(t, "imps-node-n", ReportName("n"))
}
