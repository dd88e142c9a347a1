package faults

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/imps"
)

// Every token of imps dies. The kubelet renews the file, and the process goes on without a
// restart.
func TestADeadTokenIsSurvived(t *testing.T) {
	const life = 20 * time.Second
	for name, die := range map[string]struct {
		// begin changes the token that a process starts with.
		begin func(s *system, p *process, account string)
		end   func(s *system, account string)
	}{
		"its ServiceAccount was deleted and made again": {
			func(*system, *process, string) {},
			func(s *system, account string) { s.recreateAccount(account) },
		},
		"it has expired": {
			func(s *system, p *process, account string) {
				token, err := control.ExpiringToken(s.t.Context(), imps.SystemNamespace, account, life)
				require.NoError(s.t, err)
				p.spec.Config.BearerToken = token
			},
			func(s *system, _ string) { s.patience = life + within },
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSystem(t)
			s.source("hub", "registry.one")
			all := want{namespaces: s.namespaces(2, "a"), registry: "registry.one"}
			all.resource = s.resource("all", "hub", s.byLabel("a")+", "+s.byPods("a"))
			leader := s.coordinator("a", func(p *process) {
				die.begin(s, p, imps.CoordinatorAccount)
				s.withTokenFile(p)
			})
			s.leads(leader)
			agent := s.agent("node-a", func(p *process) {
				die.begin(s, p, imps.AgentAccount)
				s.withTokenFile(p)
			})
			s.settles(all)

			die.end(s, imps.CoordinatorAccount)
			die.end(s, imps.AgentAccount)
			s.refused(leader)
			s.refused(agent)
			// What happens meanwhile is not lost.
			mark := control.Audit().Mark()
			all.registry = "registry.two"
			s.source("hub", all.registry)
			byPod := s.namespace("")
			s.pod(byPod, "node-a", "a")
			all.namespaces = append(all.namespaces, byPod)
			s.unauthorized(mark, "(cluster)")
			s.unauthorized(mark, "(node)")
			require.Empty(t, s.writes(mark))

			token, err := control.Token(t.Context(), imps.SystemNamespace, imps.CoordinatorAccount)
			require.NoError(t, err)
			s.renew(leader, token)
			token, err = control.NodeToken(t.Context(), imps.SystemNamespace, imps.AgentAccount, "node-a")
			require.NoError(t, err)
			s.renew(agent, token)
			// client-go reads a token file once a minute, and what fails until then is tried
			// again within a minute.
			s.patience = 2*time.Minute + within
			s.settles(all)
			s.demands("node-a", byPod)
			writes, wanted := s.writes(mark), rotation(all)
			require.LessOrEqual(t, writes[target(byPod)], 2, "the agent may come back first, with what it knew")
			delete(writes, target(byPod))
			delete(wanted, target(byPod))
			require.Equal(t, wanted, writes)
			for _, p := range []*process{leader, agent} {
				require.Equal(t, 1, strings.Count(p.Log(), "msg=starting"), "it was not started again")
			}
		})
	}
}

// withTokenFile has a process read its token from a file, as in a Pod.
func (s *system) withTokenFile(p *process) {
	p.spec.Config.BearerTokenFile = filepath.Join(s.dir, p.spec.Name+".token")
	s.renew(p, p.spec.Config.BearerToken)
}

// renew replaces the token as the kubelet does: at once.
func (s *system) renew(p *process, token string) {
	s.t.Helper()
	file := p.spec.Config.BearerTokenFile
	require.NoError(s.t, os.WriteFile(file+".new", []byte(token), 0o600))
	require.NoError(s.t, os.Rename(file+".new", file))
}

func (s *system) recreateAccount(name string) {
	s.t.Helper()
	accounts := s.core.CoreV1().ServiceAccounts(imps.SystemNamespace)
	was, err := accounts.Get(s.t.Context(), name, metav1.GetOptions{})
	require.NoError(s.t, err)
	require.NoError(s.t, accounts.Delete(s.t.Context(), name, metav1.DeleteOptions{}))
	_, err = accounts.Create(s.t.Context(), &corev1.ServiceAccount{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: was.Labels, Annotations: was.Annotations},
	}, metav1.CreateOptions{})
	require.NoError(s.t, err)
}

// refused waits until the API server refuses the token of a process: it knows one that it
// has accepted for ten seconds.
func (s *system) refused(p *process) {
	s.t.Helper()
	client, err := kubernetes.NewForConfig(control.ConfigForToken(p.spec.Config.BearerToken))
	require.NoError(s.t, err)
	s.eventually(func() error {
		_, err := client.AuthenticationV1().SelfSubjectReviews().Create(s.t.Context(), &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
		if !apierrors.IsUnauthorized(err) {
			return fmt.Errorf("the answer is %w", err)
		}
		return nil
	}, "the token of %s is not refused", p.Name)
}

// unauthorized waits until a process has asked for something with a token that is refused.
func (s *system) unauthorized(mark cluster.Mark, agent string) {
	s.t.Helper()
	s.eventually(func() error {
		events, err := control.Audit().Since(mark)
		require.NoError(s.t, err)
		for _, e := range events { // of such a request it has no last stage
			if e.Code == http.StatusUnauthorized && strings.HasSuffix(e.UserAgent, agent) {
				return nil
			}
		}
		return errors.New("not yet")
	}, "%s asks for nothing", agent)
}
