package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// It asserts counts only: times depend on who else uses the machine.
func TestBenchAsksBothProviders(t *testing.T) {
	t.Parallel()
	var progress bytes.Buffer
	r, err := measure(t.Context(), settings{sizes: []string{sizeProvider}, repeats: 1, answers: 2}, &progress)
	require.NoError(t, err, progress.String())
	require.Len(t, r.Runs, 1)
	run := r.Runs[0].Provider
	require.Contains(t, run.Beside, "k8s.io/cloud-provider-aws v")

	require.Len(t, run.Answers, 1+6*len(recordSets())+1+len(latencies))
	seen := map[string]bool{}
	for _, a := range run.Answers {
		want := 2
		if a.Name == answerWaits {
			want = 1
			require.Greater(t, a.Times.P50, 500.0, "it waits")
		}
		require.False(t, seen[a.Name], "%s is asked twice", a.Name)
		seen[a.Name] = true
		require.Equal(t, want, a.Times.Samples, a.Name)
		require.Positive(t, a.CPU.P50, a.Name)
		require.Positive(t, a.PeakMiB, a.Name)
	}
	calls := map[string]int{}
	for _, b := range run.Bursts {
		calls[b.Name] = b.Calls
	}
	want := map[string]int{answerHit: 0}
	for _, latency := range latencies {
		want[besideName(latency)] = pulls
	}
	require.Equal(t, want, calls)
	require.Less(t, run.BinaryMB[impsProvider], run.BinaryMB[ecrProvider])

	raw, err := json.Marshal(r)
	require.NoError(t, err)
	read := &result{}
	require.NoError(t, json.Unmarshal(raw, read))
	require.Equal(t, r, read)
	var out bytes.Buffer
	require.NoError(t, r.print(&out, true))
	for _, name := range append([]string{answerHit, answerWaits}, besideName(0)) {
		require.Contains(t, out.String(), name)
	}
	require.NotContains(t, out.String(), "Kubernetes", "there is none")
	require.Len(t, r.goals(), 6+len(latencies))
	for _, g := range r.goals() {
		require.Contains(t, out.String(), g.Name)
	}
	left, err := filepath.Glob(fmt.Sprintf("/dev/shm/imps-bench-%d-*", os.Getpid()))
	require.NoError(t, err)
	require.Empty(t, left, "folders that are left")
}

func TestRecordsAreForOneHostOnly(t *testing.T) {
	t.Parallel()
	for _, set := range recordSets() {
		matching := map[string]int{}
		for _, key := range set.keys {
			for _, host := range []string{ecrHost, otherHost} {
				ok, err := path.Match(key, host)
				require.NoError(t, err)
				if ok {
					matching[host]++
				}
			}
		}
		require.Equal(t, map[string]int{ecrHost: 1}, matching, set.name)
	}
	require.Equal(t, strings.Count(ecrHost, "."), strings.Count(otherHost, "."))
}

func TestAnswersAreLookedAt(t *testing.T) {
	t.Parallel()
	const head, none = `{"kind":"CredentialProviderResponse","auth":{`, `}}`
	const one = `"r.one":{"username":"AWS","password":"right"}`
	opens := hit(func(username, password string) bool { return username == "AWS" && password == "right" })
	for name, tt := range map[string]struct {
		check  func([]byte) error
		answer string
		fault  string
	}{
		"a hit":                              {opens, head + one + none, ""},
		"a hit that is none":                 {opens, head + none, "0 credentials, where 1"},
		"a hit that opens nothing":           {opens, head + strings.Replace(one, "right", "wrong", 1) + none, "r.one is wrong"},
		"a hit with more than was asked for": {opens, head + one + `,"r.two":{}` + none, "2 credentials, where 1"},
		"a miss":                             {empty, head + none, ""},
		"a miss that is a hit":               {empty, head + one + none, "1 credentials, where 0"},
		"a miss that is no answer":           {empty, "", "read the answer"},
		"a miss of another kind":             {empty, `{"kind":"Status"}`, `a "Status"`},
		"nothing":                            {silent, "", ""},
		"nothing that is something":          {silent, "x", "there is an answer"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			err := tt.check([]byte(tt.answer))
			if tt.fault == "" {
				require.NoError(t, err)
			} else {
				require.ErrorContains(t, err, tt.fault)
			}
		})
	}
}

func TestAQuestionTellsWhatWentWrong(t *testing.T) {
	t.Parallel()
	q := question{name: "loud", command: []string{"sh", "-c", "echo why >&2; exit 3"}, check: silent}
	_, _, err := q.ask(t.Context())
	require.ErrorContains(t, err, "loud: exit status 3: why")
}

func TestQuestionsAreAskedInTurns(t *testing.T) {
	t.Parallel()
	log := filepath.Join(t.TempDir(), "log")
	ask := func(name string, every int) question {
		return question{name: name, command: []string{"sh", "-c", `echo "$0" >>"$1"`, name, log}, check: silent, every: every}
	}
	got, err := askInTurns(t.Context(), []question{ask("often", 1), ask("rarely", 3)}, 7)
	require.NoError(t, err)
	require.Len(t, got, 2)
	require.Equal(t, 7, got[0].Times.Samples)
	require.Equal(t, 2, got[1].Times.Samples)
	got, err = askInTurns(t.Context(), []question{ask("rarely", 3)}, 1)
	require.NoError(t, err)
	require.Equal(t, 1, got[0].Times.Samples, "once at least")
}

func TestPeakMemoryIsInTheLastLine(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		text string
		want float64
		ok   bool
	}{
		"alone":                       {"2048\n", 2, true},
		"after what the program says": {"I1129 main.go:1] 7\n1536\n", 1.5, true},
		"nothing":                     {"", 0, false},
		"another last line":           {"1536\nno\n", 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := lastLineMiB(tt.text)
			require.Equal(t, tt.ok, err == nil)
			require.InDelta(t, tt.want, got, 0)
		})
	}
}

func TestRequestsAreOneLine(t *testing.T) {
	t.Parallel()
	raw, err := requestFor("r.one/app", "")
	require.NoError(t, err)
	require.Equal(t, `{"kind":"CredentialProviderRequest","apiVersion":"credentialprovider.kubelet.k8s.io/v1","image":"r.one/app"}`+"\n", string(raw))
	token, err := serviceAccountToken("a", time.Now())
	require.NoError(t, err)
	require.Len(t, strings.Split(token, "."), 3)
	raw, err = requestFor("r.one/app", "a")
	require.NoError(t, err)
	require.Equal(t, 1, bytes.Count(raw, []byte("\n")))
	require.Greater(t, len(raw), len(token))
}

func TestGoalsOfTheProviderLeaveOutWhatWaits(t *testing.T) {
	t.Parallel()
	answer := func(name string, p50, peak float64) answers {
		return answers{Name: name, Times: latency{P50: p50}, PeakMiB: peak}
	}
	run := sizeRun{Size: sizeProvider, Provider: &providerRun{
		Answers: []answers{
			answer(answerHit, 2, 3), answer("imps: hit, Node, "+setShape, 4, 5), answer(answerWaits, 500, 6),
			answer(besideName(0), 8, 20), answer(besideName(latencies[1]), 20, 20), answer(besideName(latencies[2]), 40, 20),
		},
		Bursts: []burst{{Name: answerHit}, {Name: besideName(0), Calls: 100}},
	}}
	var seen []float64
	var met []bool
	for _, g := range goalsOf([]sizeRun{run})[:6] {
		seen, met = append(seen, g.Seen), append(met, g.Met)
	}
	require.Equal(t, []float64{2, 4, 25, 10, 5, 6}, seen)
	require.Equal(t, []bool{true, false, false, true, true, true}, met)
}
