package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// It asserts counts only: times depend on who else uses the machine.
func TestBenchCountsOneWriteForEachSecretAndChange(t *testing.T) {
	const each = 10 // namespaces
	s := settings{sizes: []string{"small"}, namespaces: each, repeats: 1, rate: 20, idle: time.Second}
	var progress bytes.Buffer
	r, err := measure(t.Context(), s, &progress)
	require.NoError(t, err, progress.String())
	require.Len(t, r.Runs, 1)
	run := r.Runs[0]

	writes, samples := map[string]int{}, map[string]int{}
	for _, p := range run.Phases {
		writes[p.Name], samples[p.Name] = sum(p.Account.SecretWrites), p.Latency.Samples
		require.Zero(t, p.Extra, "events of Secrets that nobody asked for, in phase %s", p.Name)
		require.Zero(t, p.Account.Refused, "writes of Secrets that were refused, in phase %s", p.Name)
	}
	want := map[string]int{phasePods: each, phaseLabels: each, phaseRotation: 2 * each, phaseIdle: 0, phaseDeletion: 2 * each}
	require.Equal(t, want, samples, "Secrets that the watcher saw change, by phase")
	require.Equal(t, want, writes, "Secret writes in the audit log, by phase")
	require.Equal(t, 2*each, run.Floor.EventBusy.Samples, "Secrets that the plain clients created")
	idle := run.phase(phaseIdle).Account
	require.Zero(t, idle.impsWrites(), "writes in the idle time but the Lease: %v", idle.OtherWrites)

	left, err := usages()
	require.NoError(t, err)
	require.Empty(t, left, "processes that are left")
	for _, process := range []string{coordinator, agentName(nodes[0]), agentName(nodes[1]), "kube-apiserver"} {
		require.Positive(t, run.Memory[process].End, "memory of %s", process)
	}

	path := filepath.Join(t.TempDir(), "figures.json")
	require.NoError(t, writeJSON(path, r))
	raw, err := os.ReadFile(path)
	require.NoError(t, err)
	read := &result{}
	require.NoError(t, json.Unmarshal(raw, read))
	require.Equal(t, r, read)
	for _, markdown := range []bool{false, true} {
		var out bytes.Buffer
		require.NoError(t, r.print(&out, markdown))
		require.Equal(t, markdown, strings.Contains(out.String(), "|---|"), "as Markdown")
		for _, g := range r.goals() {
			require.Contains(t, out.String(), g.Name)
		}
	}
}

// And one write for each ServiceAccount.
func TestBenchCountsOneWriteForEachServiceAccount(t *testing.T) {
	const each = 10 // namespaces
	var progress bytes.Buffer
	r, err := measure(t.Context(), settings{sizes: []string{"accounts"}, namespaces: each, repeats: 1, rate: 20, idle: time.Second}, &progress)
	require.NoError(t, err, progress.String())
	require.Len(t, r.Runs, 1)
	run := r.Runs[0]
	writes := func(phase string) int {
		return run.phase(phase).Account.OtherWrites[coordinator+": patch serviceaccounts"]
	}
	require.Equal(t, 3*each, writes(phaseDelivery))
	require.Equal(t, each, writes(phaseAccounts))
	require.Equal(t, each, run.phase(phaseAccounts).Latency.Samples)
	require.Zero(t, run.phase(phaseAccounts).Extra)
	require.Zero(t, writes(phaseRotation))
	require.Zero(t, writes(phaseIdle))
	require.Equal(t, 4*each, writes(phaseDeletion), "taken out again")
	var out bytes.Buffer
	require.NoError(t, r.print(&out, false))
	require.Contains(t, out.String(), "ServiceAccount created")
}
